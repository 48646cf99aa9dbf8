"""What a person may choose about a benchmark run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "deploy" / "studies"
DATA_VARIABLE = "CONSILIUM_TEST_DATA"
HIPPOCAMPUS = Path("segmentation") / "msd_task04_hippocampus"
PET = Path("pet") / "ibsi_sts"


@dataclass(frozen=True, kw_only=True)
class Options:
    """seeds: of `utility` and `course`. cache: folder where public starts and Dice are kept, None keeps none.

    quick: a smoke run that measures nothing worth reading. studies: folder of the study files.
    cases: beginnings of the names of cases to measure; all when empty.
    """

    seeds: int = 3
    cache: Path | None = None
    quick: bool = False
    studies: Path = STUDIES
    cases: tuple[str, ...] = ()

    def wants(self, case: str) -> bool:
        """Whether this case is to be measured."""
        return not self.cases or case.startswith(self.cases)


def data_folder() -> Path:
    """Folder of the open test data, which may be absent."""
    return Path(os.environ.get(DATA_VARIABLE, ROOT.parent / "shared" / "data"))


def hippocampus() -> Path | None:
    """The real hippocampus scans, None when they are absent."""
    folder = data_folder() / HIPPOCAMPUS
    return folder if folder.is_dir() else None


def pet() -> Path | None:
    """The real PET of soft-tissue sarcomas, None when it is absent."""
    folder = data_folder() / PET
    return folder if folder.is_dir() else None
