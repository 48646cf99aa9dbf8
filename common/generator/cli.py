"""`consilium sample`: new volumes from a released generator."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import Refusal
from common.evidence.cli import read_trusted_key
from common.evidence.predicate import Outcome
from common.evidence.verification import verify_bundle

_SEED_BITS = 63


def sample(
    release: Annotated[Path, typer.Argument(help="Folder of a release.", show_default=False)],
    *,
    n: Annotated[int, typer.Option("--n", min=1, max=99_999, help="How many volumes to draw.", show_default=False)],
    out: Annotated[Path, typer.Option(help="New folder for the volumes.", show_default=False)],
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw; random when left out.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM of the auditor's public key that you trust.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Verify a release, then draw new labelled volumes from its generator into a BIDS derivative."""
    # Here, because torch takes seconds to import and `--help` and a failed verification need none of it.
    from common.generator.released import draw_dataset, load_released  # noqa: PLC0415
    from common.telemetry.show import showing  # noqa: PLC0415

    verified = verify_bundle(release, trusted_key=read_trusted_key(key), now=datetime.now(UTC))
    if verified.outcome is not Outcome.RELEASE:
        raise Refusal(f"{release} is a signed refusal ({verified.outcome}); there is no generator to draw from")
    study, generator = load_released(release, verified)
    chosen = secrets.randbits(_SEED_BITS) if seed is None else seed
    with showing(quiet=as_json) as observer:
        draw_dataset(out, study=study, generator=generator, verified=verified, n=n, seed=chosen, observer=observer)
    facts = {"volumes": n, "folder": str(out), "seed": chosen, "release_digest": verified.digest}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        typer.echo(f"{n} volumes in {out}, drawn with seed {chosen} from release {verified.digest}")
