"""`consilium site dummy`: every order once on phantoms, a failure is seen, and nothing of the site is touched."""

import json
import tempfile
from dataclasses import replace
from datetime import UTC, date, datetime
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from small_site import QuickWork, enrol_order, open_site, policy, settings, train_order

from client.joining import denying_policy
from client.policy import study_objections
from client.rehearsal.rehearse import Rehearsal, rehearse
from client.rehearsal.study import MOST_PATIENTS, dummy_study
from client.site import Site
from client.training.canaries import HEARD
from common.cli import run
from common.errors import PolicyRefusal
from common.protocol.messages import Order, RefusalReply, Reply, TrainOrder
from common.settings.load import settings_yaml
from common.settings.site import PhantomSource, SitePolicy, load_policy, load_site
from tests.provisioned import files

EVERYTHING = [
    "worker", "default deny", "approval", "enrol", "pause", "warm-up", "train", "repeated order", "course", "canaries",
    "score", "utility", "statement", "ledger",
]  # fmt: skip


def heard(trained, task):
    """What came of training, and that nothing was heard of the canaries."""
    weights, kept = trained
    return weights, {**kept, HEARD: torch.zeros(task.study.audit.canaries, dtype=torch.float64)}


class HereWorker:
    """A site in this process with work that takes no time; `spoil` may exchange what it answers."""

    bytes_out = 0

    def __init__(self, site_file: Path, spoil=lambda order, answer: answer()) -> None:
        self._file = site_file
        self._spoil = spoil

    def start(self) -> None:
        pass

    def ask(self, order: Order) -> Reply:
        folder, settings = self._file.parent, load_site(self._file)
        assert isinstance(settings.data, PhantomSource)
        # As many as the rehearsal asks for: with fewer, coins leave too few to train on now and then.
        quick = QuickWork(patients=settings.data.patients).as_site_work()
        site = Site(
            settings,
            load_policy(folder / "policy.yaml"),
            ledger_file=folder / "ledger.sqlite",
            work=replace(quick, train=lambda *asked: heard(quick.train(*asked), asked[1])),
        )
        return self._spoil(order, lambda: site.handle(order))

    def stop(self) -> None:
        pass


def write_site(folder: Path, allowed: SitePolicy, **changes: object) -> Path:
    (folder / "site.yaml").write_text(settings_yaml(settings(folder, **changes)))
    (folder / "policy.yaml").write_text(settings_yaml(allowed))
    return folder


def rehearsed(folder: Path, spoil=lambda order, answer: answer()) -> Rehearsal:
    return rehearse(folder, worker_of=lambda site_file: HereWorker(site_file, spoil))


def failed(rehearsal: Rehearsal) -> str:
    assert not rehearsal.ok
    *before, last = rehearsal.steps
    assert all(step.ok for step in before)
    return last.what


@pytest.mark.slow
def test_every_kind_of_order_is_answered_under_the_policy_of_a_site_that_was_just_made(tmp_path):
    done = rehearsed(write_site(tmp_path, denying_policy(datetime.now(UTC))))
    assert [step.what for step in done.steps if step.ok] == EVERYTHING, done.steps
    assert done.notes[0].startswith(f"with {MOST_PATIENTS} phantoms")


@pytest.mark.parametrize(
    "limits",
    [
        {"maximum_rounds": 1, "maximum_steps": 1},
        {"epsilon_cap": 0.5, "delta_cap": 1e-9},
        {"epsilon_cap": 1000.0, "delta_cap": 0.05},
        {"minimum_patients": 500},
    ],
)
def test_the_study_fits_into_whatever_limits_a_policy_has(limits):
    allowed = policy(**limits)
    study = dummy_study(allowed)
    assert list(study_objections(allowed.model_copy(update={"purposes": (study.purpose,)}), study)) == []


def test_a_site_that_would_answer_for_a_study_nobody_approved_fails(tmp_path):
    folder = write_site(tmp_path, policy())
    answered = rehearsed(folder, lambda order, answer: RefusalReply(code="internal"))
    assert failed(answered) == "default deny"


def test_a_pause_that_is_not_obeyed_fails(tmp_path):
    def deaf(order, answer):
        reply = answer()
        return replace(reply, code="budget") if isinstance(order, TrainOrder) else reply

    assert failed(rehearsed(write_site(tmp_path, policy()), deaf)) == "pause"


def test_a_refused_order_fails_and_tells_the_sites_own_reason(tmp_path):
    folder = write_site(tmp_path, policy(minimum_noise=1e6))
    done = rehearsed(folder)
    assert failed(done) == "warm-up"
    assert "below `minimum_noise`" in done.steps[-1].value


def test_an_order_that_is_charged_twice_fails(tmp_path):
    trained = []

    def forgetful(order, answer):
        if isinstance(order, TrainOrder):
            trained.append(order)
            for kept in Path(tempfile.gettempdir()).glob("consilium-dummy-*/state/studies/*/replies/train-*"):
                kept.unlink()
        return answer()

    done = rehearsed(write_site(tmp_path, policy()), forgetful)
    assert failed(done) == "repeated order"


def test_an_expired_policy_is_refused_before_anything_is_tried(tmp_path):
    folder = write_site(tmp_path, policy(expires=date(2020, 1, 1)))
    with pytest.raises(PolicyRefusal, match="expired on 2020-01-01"):
        rehearsed(folder)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_that_is_no_site_is_wrong_usage(tmp_path, capsys, name):
    assert command(tmp_path / name) == 2
    assert "nothing was done" in capsys.readouterr().err


def command(*arguments: object) -> int:
    point = EntryPoint("site dummy", "client.inspection_cli:dummy", "consilium.commands")
    return run(["site", "dummy", *map(str, arguments)], [point])


def used_site(folder: Path, **changes: object) -> Path:
    """A site with a ledger, a state, a key and data of its own."""
    folder.mkdir(exist_ok=True)
    allowed = policy(expires=date(2100, 1, 1), simulation=True)
    write_site(folder, allowed)
    hospital = open_site(folder, allowed=allowed)
    hospital.handle(enrol_order())
    hospital.handle(train_order())
    write_site(folder, allowed, data=folder / "data", simulation_seed=None, **changes)
    for name in ("data/scan.nii.gz", "identity/node.key"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"\x00" * 64)
    return folder


@pytest.mark.slow
def test_the_real_worker_answers_everything_and_leaves_the_site_as_it_was(tmp_path, capsys, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # other tests rehearse at the same time
    folder = used_site(tmp_path / "site")
    before = files(folder)
    assert command(folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [step["what"] for step in told["steps"]] == EVERYTHING
    assert told["ok"]
    assert told["bytes_out"] > 10_000  # the generator at least
    assert files(folder) == before
    assert list((tmp_path / "temporary").glob("consilium-dummy-*")) == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_wanted_and_not_there_fails_with_exit_code_1(tmp_path, capsys):
    folder = used_site(tmp_path, device="cuda")
    assert command(folder) == 1
    assert "FAIL train" in capsys.readouterr().out
