"""`python -m tests.benchmarks [NAME ...]`: measure, print a Markdown table, write build/bench/NAME.json."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import ENVIRONMENT
from common.telemetry.quiet import drop_logs, quieten_libraries
from tests.benchmarks.options import ROOT, STUDIES, Options
from tests.benchmarks.report import markdown, write_results

BENCHMARKS = {
    "accountants": "epsilon by several accountants, the noise that targets need, and the published example",
    "audit": "what the audit finds of planted copies beside peers, how often it errs, and its speed",
    "course": "PET in whole campaigns: attacks by critic and generator, Dice, and what following them costs in time",
    "dp_step": "a critic's step with patient-level privacy beside the plain step, Opacus and other ways",
    "federation": "a message phase with our runner beside Flower's executor, and a coordinator's memory with 50 sites",
    "noniid": "sites whose patients differ: alone, averaged, as an ensemble, distilled, and pooled",
    "simulation": "what the in-process federation costs beyond the sites' training",
    "utility": "Dice on real held-out patients of segmenters trained on synthetic scans, and of peers",
}


def main(arguments: Sequence[str]) -> int:
    """Run the named benchmarks, all without a name. Returns the exit code; wrong usage exits with 2."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark is named {', '.join(unknown)}; nothing was measured. There are: {_known()}.")
    if chosen.seeds < 1:
        parser.error(f"--seeds {chosen.seeds}: a segmenter needs at least one seed; nothing was measured.")
    os.environ.update(ENVIRONMENT)  # before Flower is imported
    quieten_libraries()
    drop_logs()
    options = Options(
        seeds=chosen.seeds,
        cache=chosen.cache,
        quick=chosen.quick,
        studies=chosen.studies,
        cases=tuple(chosen.case),
    )
    for name in chosen.names or BENCHMARKS:
        began = time.monotonic()
        rows = importlib.import_module(f"tests.benchmarks.{name}").run(options)
        path = write_results(name, rows, chosen.out)
        print(f"\n## {name}\n\n{markdown(rows)}\n\n{path} ({time.monotonic() - began:.0f} s)", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__, epilog=_known())
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; all without one")
    parser.add_argument(
        "--seeds",
        type=int,
        default=int(os.environ.get("CONSILIUM_BENCH_SEEDS", "3")),
        help="seeds of `utility` and `course` (3, or CONSILIUM_BENCH_SEEDS)",
    )
    cache = os.environ.get("CONSILIUM_BENCH_CACHE")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(cache) if cache else None,
        help="folder where public starts and Dice are kept between runs (none, or CONSILIUM_BENCH_CACHE)",
    )
    parser.add_argument("--studies", type=Path, default=STUDIES, help="folder of hippocampus.yaml and its variants")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder of the JSON files")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="of `audit`, `course` and `utility`: only cases that begin so; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run on phantoms; its numbers mean nothing")
    return parser


def _known() -> str:
    return "; ".join(f"{name} ({what})" for name, what in BENCHMARKS.items())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
