"""The disks of simulated hospitals: a site.yaml and a policy.yaml each, as a real hospital would write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from common.errors import UsageError
from common.evidence.atomic import write_atomic
from common.installed import code_digest
from common.privacy.mechanism import Plan
from common.settings.load import load_settings, settings_yaml, study_digest
from common.settings.site import Approval, OrderKind, PartBy, PhantomSource, SitePolicy, SiteSettings
from common.settings.study import Study
from common.volume.layouts import Found, Layout, find_pairs
from common.volume.spacing_groups import spacing_groups
from server.run_folder import RunFolder
from server.seeds import derive

DEFAULT_SITES: Final = 3
_POLICY_DAYS: Final = 365
_PET_LAYOUTS: Final = (Layout.PET, Layout.DICOM)  # collections of several scanners in one folder
_APPROVER: Final = "consilium simulate"


@dataclass(frozen=True, kw_only=True)
class Cohorts:
    """Where the simulated hospitals' patients come from.

    folder: real scans, shared out by patient, or one sub-folder `site-1`, `site-2`, ... for each hospital;
    None draws `phantoms` patients for each. sites: None takes the sub-folders there are, else three. split: how one
    folder is shared out; None takes voxel sizes where a folder of PET has as many as there are sites, else patients.
    """

    folder: Path | None
    sites: int | None
    phantoms: int
    split: PartBy | None = None


def plan_sites(study: Study, cohorts: Cohorts, seed: int) -> tuple[SiteSettings, ...]:
    """One installation for each simulated hospital. Reads file names, and headers of PET or for voxel sizes, no scan.

    Raises UsageError for too few sites, a missing folder, too few patients for the study's minimum, or a split that
    the scans do not have.
    """
    if cohorts.folder is None and cohorts.split is not None:
        raise UsageError("--split shares out a folder of scans, and --data names none; nothing was done. Leave it out.")
    settings = (
        _phantom_sites(study, cohorts, seed)
        if cohorts.folder is None
        else _folder_sites(study, cohorts.folder.absolute(), cohorts, seed)
    )
    if len(settings) < study.federation.quorum:
        raise UsageError(
            f"{len(settings)} sites are fewer than the study's quorum of {study.federation.quorum}; nothing was done. "
            "Raise --sites, or lower `federation.quorum` in the study."
        )
    return settings


def check_sites(run: RunFolder, settings: Sequence[SiteSettings]) -> None:
    """Raise UsageError when a hospital of this run has other patients than `settings` say."""
    for site in settings:
        site_file = run.sites / site.site / "site.yaml"
        if site_file.exists() and load_settings(site_file, SiteSettings) != site:
            raise UsageError(
                f"{site.site} of the run in {run.path} has other patients than this command gives it; nothing was "
                "done. Repeat the command that began the run, or choose a new folder with --out."
            )


def write_sites(
    run: RunFolder, settings: Sequence[SiteSettings], study: Study, plan: Plan, *, coordinator_key: str, now: datetime
) -> None:
    """Write what is not there yet: a resumed run keeps its hospitals and their policies to the letter.

    coordinator_key: Ed25519 public key, hex, of the run; the hospitals approve the study for no other.
    """
    policy = settings_yaml(_policy(study, plan, coordinator_key, now)).encode()
    for site in settings:
        folder = run.sites / site.site
        folder.mkdir(parents=True, exist_ok=True)
        site_file, policy_file = folder / "site.yaml", folder / "policy.yaml"
        if not site_file.exists():
            write_atomic(site_file, settings_yaml(site).encode())
        if not policy_file.exists():
            write_atomic(policy_file, policy)


def _policy(study: Study, plan: Plan, coordinator_key: str, now: datetime) -> SitePolicy:
    """Exactly this study, and nothing that its plan does not need."""
    approval = Approval(
        digest=study_digest(study),
        study=study.study,
        coordinator_key=coordinator_key,
        approved_by=_APPROVER,
        approved_on=now.date(),
    )
    return SitePolicy(
        studies=(approval,),
        purposes=(study.purpose,),
        orders=tuple(OrderKind),
        code_digests=(code_digest(),),
        epsilon_cap=study.privacy.epsilon_cap,
        delta_cap=study.privacy.delta,
        minimum_noise=min(part.noise_multiplier for part in plan.mechanisms),
        maximum_rounds=plan.rounds,
        maximum_steps=plan.mechanism.steps,
        minimum_patients=study.federation.minimum_patients,
        research_answers=True,  # asked only after the outcome is signed, for comparison; a real site never allows it
        simulation=True,
        expires=(now + timedelta(days=_POLICY_DAYS)).date(),
    )


def _phantom_sites(study: Study, cohorts: Cohorts, seed: int) -> tuple[SiteSettings, ...]:
    count = DEFAULT_SITES if cohorts.sites is None else cohorts.sites
    _enough_patients(study, cohorts.phantoms, "--patients", 1)
    return tuple(
        _site(
            number,
            seed,
            data=PhantomSource(
                kind=study.warm_start.phantom,
                patients=cohorts.phantoms,
                # Never the campaign's own seed: the public warm start draws its phantoms from that.
                seed=derive(seed, "patients"),
                site=number,  # scanner 0 is the public one
            ),
        )
        for number in range(1, count + 1)
    )


def _folder_sites(study: Study, folder: Path, cohorts: Cohorts, seed: int) -> tuple[SiteSettings, ...]:
    if not folder.is_dir():
        raise UsageError(f"--data {folder} is not a folder; nothing was done. Give the folder that holds the scans.")
    own, count = _own_folders(folder), cohorts.sites
    if own and count not in (None, len(own)):
        raise UsageError(
            f"--data {folder} has folders for {len(own)} sites, --sites asks for {count}; nothing was done. "
            "Leave --sites out."
        )
    if own and cohorts.split is not None:
        raise UsageError(f"--data {folder} has a folder for each site; nothing was done. Leave --split out.")
    if own:
        for site_folder in own:
            _enough_patients(study, _patients(_found(site_folder)), f"--data {site_folder}", 1)
        return tuple(_site(number, seed, data=path) for number, path in enumerate(own, start=1))
    found = _found(folder)
    by_size = _spacing_sites(study, folder, found, cohorts, seed)
    if by_size:
        return by_size
    parts = DEFAULT_SITES if count is None else count
    _enough_patients(study, _patients(found), f"--data {folder}", parts)
    return tuple(_site(i + 1, seed, data=folder, part=(i, parts)) for i in range(parts))


def _own_folders(folder: Path) -> list[Path]:
    """`site-1` ... `site-N` without a gap; a gap ends them."""
    found: list[Path] = []
    while (folder / f"site-{len(found) + 1}").is_dir():
        found.append(folder / f"site-{len(found) + 1}")
    return found


def _spacing_sites(study: Study, folder: Path, found: Found, cohorts: Cohorts, seed: int) -> tuple[SiteSettings, ...]:
    """One site for each voxel size; none where the folder is split by patient.

    Raises UsageError when voxel sizes are asked for and there are not as many as sites.
    """
    asked = cohorts.split is PartBy.SPACING
    if not asked and (cohorts.split is not None or found.layout not in _PET_LAYOUTS):
        return ()
    groups = spacing_groups(found.pairs)
    parts = cohorts.sites or (len(groups) if asked else DEFAULT_SITES)
    if len(groups) != parts:
        if asked:
            raise UsageError(
                f"--data {folder} has scans of {len(groups)} voxel sizes, --sites asks for {parts}; nothing was done. "
                f"Give --sites {len(groups)}, or --split patient."
            )
        return ()
    for number, group in enumerate(groups, start=1):
        where = f"voxel size {number} of {parts} in --data {folder}"
        _enough_patients(study, len(group), where, 1, "Use more patients, or --split patient.")
    return tuple(_site(i + 1, seed, data=folder, part=(i, parts), part_by=PartBy.SPACING) for i in range(parts))


def _found(folder: Path) -> Found:
    """Pairs of image and label in a folder. Raises UsageError (DataError) when there is none."""
    found = find_pairs(folder)
    if not found.pairs:
        raise UsageError(
            f"--data {folder} holds no usable pair of image and label ({len(found.refused)} files refused); "
            "nothing was done. Expected BIDS, nnU-Net folders, a manifest.csv, or PET as NIfTI or DICOM."
        )
    return found


def _patients(found: Found) -> int:
    return len({pair.patient for pair in found.pairs})


def _enough_patients(
    study: Study, patients: int, where: str, parts: int, advice: str = "Use more patients or fewer sites."
) -> None:
    """Refuse what every site would have to refuse; a site counts again, after reading the scans."""
    trained_on = patients / parts * (1 - study.audit.holdout_fraction)
    if trained_on < study.federation.minimum_patients:
        share = f" shared by {parts} sites" if parts > 1 else ""
        raise UsageError(
            f"{where}: {patients} patients{share}, {study.audit.holdout_fraction:.0%} of them held out, leave about "
            f"{trained_on:.0f} to train on at a site; the study needs {study.federation.minimum_patients}. "
            f"Nothing was done. {advice}"
        )


def _site(
    number: int,
    seed: int,
    *,
    data: Path | PhantomSource,
    part: tuple[int, int] | None = None,
    part_by: PartBy = PartBy.PATIENT,
) -> SiteSettings:
    return SiteSettings(
        site=f"site-{number}",
        data=data,
        part=part,
        part_by=part_by,
        state=Path("state"),
        simulation_seed=derive(seed, "site", number),
    )
