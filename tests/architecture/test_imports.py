"""The rules of the layout, read from the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "client", "server")
HEAVY = {
    "flwr": {
        "client/app.py",
        "client/rehearsal/worker.py",
        "client/egress_gate.py",
        "client/order_worker.py",
        "client/runner.py",
        "client/runner_flower.py",
        "client/supernode.py",
        "common/protocol/codec.py",
        "server/app.py",
        "server/federation/control.py",
        "server/simulate.py",
        "server/sites.py",
    },
    "nibabel": {"common/volume/nifti.py"},
    "opacus": {"client/training/clipping/opacus_samplers.py", "common/privacy/accounting.py"},
    "prometheus_client": {"common/telemetry/metrics.py", "common/telemetry/serving.py"},
    "monai": {"common/measure/segmentation.py"},
    "matplotlib": {
        "server/audit/drawing.py",
        "server/audit/figures.py",
        "server/audit/attack_figures.py",
        "server/audit/course_figures.py",
    },
    "pydicom": {"common/volume/dicom.py"},
    "weasyprint": {"server/audit/pdf.py"},
}
# Agreed by both sides, used by one so far: the design's layout puts them in common, and says who comes next.
SECOND_CUSTOMER_TO_COME = {
    "common.measure.course": "a site shows its own course, with its critic's attack, to its own staff",
    "common.measure.fidelity.comparison": "goes with fidelity",
    "common.measure.fidelity.content_order": "goes with fidelity",
    "common.measure.fidelity.distances": "goes with fidelity",
    "common.measure.fidelity.diversity": "goes with fidelity",
    "common.measure.fidelity.encoder": "goes with fidelity",
    "common.measure.fidelity.fidelity": "a site compares a release with its own patients at home",
    "common.measure.fidelity.grey_values": "goes with fidelity",
    "common.measure.fidelity.precision_recall": "goes with fidelity",
    "common.measure.fidelity.radiomics": "goes with fidelity",
    "common.measure.private_choice": "a site that holds the scores draws the choice from its own stream",
    "common.measure.surface_distance": "sites answer HD95 beside Dice",
    "common.measure.intervals": "sites state their own bounds (mechanism audit)",
    "common.measure.membership": "sites audit somebody else's synthetic set on their own",
    "common.measure.proven_epsilon": "sites state what their own audit of somebody else's synthetic set proves",
    "common.privacy.calibration": "a site's ledger answers what-if questions with the same rule",
    "common.privacy.ledger": "an auditor verifies a ledger that a hospital shows",
    "common.privacy.ledger_file": "goes with the ledger",
    "common.privacy.ledger_rows": "goes with the ledger",
    "common.protocol.manifest": "the site-owned runner and the coordinator check the same manifest",
    "common.telemetry.logs": "the site's runner writes the same JSON log",
    "common.telemetry.metrics": "the site's runner serves the same metrics",
    "common.telemetry.show": "`consilium site check` shows the same progress",
}
DRAWERS = {"utils", "util", "helpers", "helper", "misc", "base", "manager", "constants", "common_utils"}


def modules() -> list[Path]:
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Every module name that the file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # from package import module


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    ("package", "forbidden"), [("common", {"client", "server"}), ("client", {"server"}), ("server", {"client"})]
)
def test_sides_do_not_import_each_other(package: str, forbidden: set[str]) -> None:
    wrong = [
        f"{name(path)} imports {module}"
        for path in modules()
        if path.is_relative_to(ROOT / package)
        for module in imports(path)
        if module.split(".")[0] in forbidden
    ]
    assert wrong == []


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_heavy_libraries_enter_through_named_files_only(library: str) -> None:
    found = {name(path) for path in modules() if any(m.split(".")[0] == library for m in imports(path))}
    assert found <= HEAVY[library], f"{library} is imported in {sorted(found - HEAVY[library])}"


def test_no_drawers() -> None:
    assert [name(p) for p in modules() if p.stem in DRAWERS or p.parent.name in DRAWERS] == []


def test_a_module_is_in_common_only_when_both_sides_need_it() -> None:
    """Directly or through another module of common; an entry point of our own command counts as both."""
    users: dict[str, set[str]] = {}
    graph = {name(p).removesuffix(".py").replace("/", "."): set(imports(p)) for p in modules()}
    declared = (ROOT / "pyproject.toml").read_text()
    # Alembic finds the ledger's migrations by their folder; nobody imports them.
    named = [m for m in graph if m.startswith("common.") and ".migrations." not in m and not m.endswith("__init__")]
    for module in named:
        if f'"{module}:' in declared:
            users[module] = {"client", "server"}
            continue
        seen, frontier = set(), {module}
        while frontier:
            target = frontier.pop()
            for other, targets in graph.items():
                if target in targets and other not in seen:
                    seen.add(other)
                    frontier.add(other)
        sides = {m.split(".")[0] for m in seen if not m.startswith("common.")}
        commanded = {m for m in seen if f'"{m}:' in declared and m.startswith("common.")}
        users[module] = sides | ({"client", "server"} if commanded else set())
    alone = {module: sorted(sides) for module, sides in users.items() if sides != {"client", "server"}}
    assert set(alone) <= set(SECOND_CUSTOMER_TO_COME), alone


def test_nothing_happens_on_import() -> None:
    """A module's top level holds definitions, constants and imports: no call to open, print, run or seed."""
    banned = {"open", "print", "seed", "manual_seed", "makedirs", "mkdir", "system", "run", "Popen"}
    wrong = []
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = node.value.func
                label = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if label in banned:
                    wrong.append(f"{name(path)}:{node.lineno} {label}()")
    assert wrong == []


def test_no_absolute_path_of_a_machine_in_the_tree() -> None:
    text_files = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".yaml", ".toml", ".txt"} and p.is_file()]
    ours = [p for p in text_files if not {".venv", "build", "runs", ".git"} & set(p.relative_to(ROOT).parts)]
    pieces = ("/" + "work/", "/" + "root/", "/" + "home/")
    assert [name(p) for p in ours if any(piece in p.read_text(errors="replace") for piece in pieces)] == []
