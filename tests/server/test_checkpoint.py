"""Checkpoints: whole or not at all, and damage is said, not worked around."""

from pathlib import Path

import numpy as np
import pytest

from common.errors import IntegrityError
from common.generator.weights import Weights
from server.checkpoint import KEPT_ROUNDS, Checkpoint, CheckpointStore, RoundRecord

STUDY = "5" * 64


def weights(value: float) -> Weights:
    return Weights({"layer": np.full((4, 3), value, dtype=np.float32)})


def checkpoint(number: int, *, average: float | None = None) -> Checkpoint:
    w = weights(number)
    a = w if average is None else weights(average)
    record = RoundRecord(
        study_digest=STUDY,
        round=number,
        replies={"site-1": "1" * 64, "site-2": "2" * 64},
        update_norms={"site-1": 0.5, "site-2": 0.25},
        excluded={"site-3": "no reply before the deadline"},
        start_digest="0" * 64,
        weights_digest=w.digest,
        average_digest=a.digest,
        seconds=1.5,
    )
    return Checkpoint(record=record, weights=w, average=a)


def store_with(folder: Path, *numbers: int) -> CheckpointStore:
    store = CheckpointStore(folder, study_digest=STUDY)
    for number in numbers:
        store.save(checkpoint(number))
    return store


def test_a_folder_without_checkpoints_has_no_latest(tmp_path: Path):
    assert store_with(tmp_path).latest() is None


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    store = CheckpointStore(tmp_path, study_digest=STUDY)
    store.save(checkpoint(1, average=0.125))
    back = store.latest()
    assert back is not None
    assert back.record == checkpoint(1, average=0.125).record
    assert (back.weights.digest, back.average.digest) == (weights(1).digest, weights(0.125).digest)


def test_the_latest_round_counts(tmp_path: Path):
    latest = store_with(tmp_path, 1, 2, 3).latest()
    assert latest is not None
    assert latest.record.round == 3


def test_arrays_without_their_json_are_a_round_that_did_not_happen(tmp_path: Path):
    store = store_with(tmp_path, 1, 2)
    (tmp_path / "round-0002.json").unlink()
    latest = store.latest()
    assert latest is not None
    assert latest.record.round == 1


@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_truncated_checkpoint_names_its_round_the_intact_one_and_the_remedy(tmp_path: Path, length: int):
    store = store_with(tmp_path, 1, 2, 3)
    arrays = tmp_path / "round-0003.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:length])
    with pytest.raises(IntegrityError) as caught:
        store.latest()
    text = str(caught.value)
    assert "checkpoint of round 3 is damaged" in text
    assert "round 2 is intact" in text
    assert f"delete {tmp_path / 'round-0003.json'}" in text
    (tmp_path / "round-0003.json").unlink()  # the remedy works
    latest = store.latest()
    assert latest is not None
    assert latest.record.round == 2


def test_one_flipped_byte_is_damage(tmp_path: Path):
    store = store_with(tmp_path, 1)
    arrays = tmp_path / "round-0001.safetensors"
    data = bytearray(arrays.read_bytes())
    data[-1] ^= 1
    arrays.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"round 1 is damaged.*No earlier checkpoint is intact"):
        store.latest()


def test_two_damaged_rounds_are_both_named_in_the_remedy(tmp_path: Path):
    store = store_with(tmp_path, 1, 2, 3)
    (tmp_path / "round-0003.safetensors").write_bytes(b"")
    (tmp_path / "round-0002.safetensors").unlink()
    with pytest.raises(IntegrityError, match=r"round 1 is intact.*round-0002\.json.*round-0003\.json"):
        store.latest()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1, "sha256": "0"}', "not json"])
def test_damaged_json_is_one_clear_error(tmp_path: Path, text: str):
    store = store_with(tmp_path, 1)
    (tmp_path / "round-0001.json").write_text(text)
    with pytest.raises(IntegrityError, match="round 1 is damaged"):
        store.latest()


def test_a_checkpoint_of_another_study_is_not_loaded(tmp_path: Path):
    store_with(tmp_path, 1)
    with pytest.raises(IntegrityError, match="another round, study or version"):
        CheckpointStore(tmp_path, study_digest="6" * 64).latest()


def test_old_arrays_are_dropped_and_their_facts_stay(tmp_path: Path):
    store = store_with(tmp_path, *range(1, 7))
    assert len(list(tmp_path.glob("*.safetensors"))) == KEPT_ROUNDS
    assert [record.round for record in store.records()] == [1, 2, 3, 4, 5, 6]
