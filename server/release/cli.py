"""Lay a release out for other software: `consilium release nnunet`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.evidence.cli import read_revocations, read_trusted_key
from common.evidence.verification import verify_bundle

_FIRST_FREE = 500  # nnU-Net's own data sets and those of the Medical Segmentation Decathlon have lower numbers


def nnunet(
    release: Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option(help="nnU-Net's folder nnUNet_raw; a data set is added.", show_default=False)],
    number: Annotated[int, typer.Option("--id", min=1, max=999, help="Number of the data set.")] = _FIRST_FREE,
    key: Annotated[Path | None, typer.Option(help="PEM of the auditor's public key that you trust.")] = None,
    revocations: Annotated[Path | None, typer.Option(help="The auditor's newest list of revocations.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Verify a release, then lay its volumes out as an nnU-Net v2 data set."""
    # Here, because `--help` and a failed verification need neither.
    from common.telemetry.show import showing  # noqa: PLC0415
    from server.release.nnunet import export_nnunet  # noqa: PLC0415

    verified = verify_bundle(
        release,
        trusted_key=read_trusted_key(key),
        now=datetime.now(UTC),
        revocations=read_revocations(revocations),
    )
    with showing(quiet=as_json) as observer:
        written = export_nnunet(release, out, number=number, verified=verified, observer=observer)
    if as_json:
        facts = {
            "folder": str(written.folder),
            "cases": written.cases,
            "labels": dict(written.labels),
            "release_digest": verified.digest,
        }
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(f"{written.cases} cases in {written.folder}, from release {verified.digest}")
