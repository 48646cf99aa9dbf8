"""What lies on the hospital's disk survives, and what was changed there is noticed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_site import GENERATOR, HEAD, STUDY_DIGEST, enrol_order, nudged, score_order, train_order

from client.cohort import Cohort, draw_holdout
from client.randomness import SecureStream
from client.store import SiteStore, StudyStore
from common.errors import IntegrityError
from common.protocol import codec
from common.protocol.messages import TrainReply


def cohort(seed: int = 0) -> Cohort:
    patients = {f"p{i}": np.full((1, 2, 16, 16, 16), i, np.float16) for i in range(6)}
    return Cohort.from_patients(patients, draw_holdout(sorted(patients), 0.4, SecureStream.from_seed(seed, "t")))


def begun(folder: Path) -> StudyStore:
    return SiteStore(folder).begin(enrol_order(), cohort())


def reply(number: int) -> TrainReply:
    weights = nudged(GENERATOR, float(number))
    return TrainReply(
        study_digest=STUDY_DIGEST, round=number, weights=weights, weights_digest=weights.digest, ledger_head=HEAD
    )


def hold(store: StudyStore, number: int) -> None:
    store.save_state(number, {"critic.weight": torch.full((2, 2), float(number)), "step": torch.tensor(number)})
    store.save_reply(train_order(number), reply(number))


def test_enrolment_and_cohort_come_back_after_a_restart(tmp_path):
    begun(tmp_path)
    store = SiteStore(tmp_path).study(STUDY_DIGEST)
    assert codec.pack(store.enrolment()) == codec.pack(enrol_order())
    assert store.cohort().split.commitment == cohort().split.commitment


def test_second_enrolment_after_a_kill_keeps_the_first_holdout(tmp_path):
    first = begun(tmp_path)
    first.enrolment_file.unlink()  # killed after the cohort was stored
    assert SiteStore(tmp_path).study(STUDY_DIGEST) is None
    again = SiteStore(tmp_path).begin(enrol_order(), cohort(seed=1))
    assert again.cohort().split.commitment == cohort(seed=0).split.commitment


def test_reply_belongs_to_exactly_one_order(tmp_path):
    store = begun(tmp_path)
    hold(store, 1)
    assert codec.pack(store.reply(train_order(1))) == codec.pack(reply(1))
    assert store.reply(train_order(1, deadline_s=61.0)) is None
    assert store.reply(train_order(2)) is None
    assert store.reply(score_order()) is None


def test_round_counts_as_done_only_with_its_reply(tmp_path):
    store = begun(tmp_path)
    assert store.last_round() == 0
    assert store.last_state() is None
    hold(store, 1)
    store.save_state(2, {"critic.weight": torch.zeros(1)})
    assert store.last_round() == 1
    state = store.last_state()
    assert torch.equal(state["critic.weight"], torch.full((2, 2), 1.0))
    assert int(state["step"]) == 1


def test_last_two_states_are_kept(tmp_path):
    store = begun(tmp_path)
    for number in (1, 2, 3, 7):
        hold(store, number)
    assert sorted(path.name for path in store.folder.glob("round-*")) == ["round-0003.state", "round-0007.state"]
    assert store.last_round() == 7


def test_states_of_unfinished_rounds_never_push_out_the_last_done_one(tmp_path):
    store = begun(tmp_path)
    hold(store, 1)
    for number in (2, 3, 4):  # trained and killed before the reply, three times
        store.save_state(number, {"critic.weight": torch.zeros(1)})
    assert float(store.last_state()["critic.weight"][0, 0]) == 1.0


@pytest.mark.parametrize("name", ["enrolment", "round-0001.state", "replies/train"])
def test_one_flipped_bit_is_noticed(tmp_path, name):
    store = begun(tmp_path)
    hold(store, 1)
    (path,) = store.folder.glob(f"{name}*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="not what was written"):
        {"enrolment": store.enrolment, "round-0001.state": store.last_state}.get(
            name, lambda: store.reply(train_order(1))
        )()


def test_missing_state_of_a_done_round_is_noticed(tmp_path):
    store = begun(tmp_path)
    hold(store, 1)
    (store.folder / "round-0001.state").unlink()
    with pytest.raises(IntegrityError, match="missing although round 1 was done"):
        store.last_state()


def test_holdout_key_is_drawn_once(tmp_path):
    store = SiteStore(tmp_path)
    assert store.holdout_key(b"a" * 32) == b"a" * 32
    assert store.holdout_key(b"b" * 32) == b"a" * 32
    (tmp_path / "holdout.key").write_bytes(b"c" * 64)
    with pytest.raises(IntegrityError):
        store.holdout_key(b"b" * 32)


@pytest.mark.parametrize("digest", ["..", "../" + "a" * 61, "", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_digest_that_is_none_never_becomes_a_path(tmp_path, digest):
    assert SiteStore(tmp_path).study(digest) is None
    with pytest.raises(ValueError, match="64 hex digits"):
        SiteStore(tmp_path).begin(enrol_order(study_digest=digest), cohort())


def test_half_written_files_of_a_kill_are_ignored(tmp_path):
    store = begun(tmp_path)
    hold(store, 1)
    (store.replies / f".train-0009-{'a' * 64}.x.part").write_bytes(b"half")
    (store.folder / ".round-0009.state.x.part").write_bytes(b"half")
    assert store.last_round() == 1
    hold(store, 2)
    assert store.last_round() == 2
