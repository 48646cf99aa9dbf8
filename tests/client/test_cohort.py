"""The cohort: a hold-out nobody can redraw, draws that depend on one patient each, and a file that tells damage."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.cohort import Cohort, Split, commit_split, draw_holdout, poisson_draw, verify_commitment
from client.randomness import SecureStream
from common.errors import DataError, IntegrityError

PATIENTS = [f"p{i:03d}" for i in range(40)]


def stream(seed: int = 0) -> SecureStream:
    return SecureStream.from_seed(seed, "test")


def cohort(patients: list[str] = PATIENTS, seed: int = 0) -> Cohort:
    rng = np.random.default_rng(seed)
    scans = {p: rng.normal(size=(1 + i % 2, 2, 4, 4, 4)).astype(np.float16) for i, p in enumerate(patients)}
    return Cohort.from_patients(scans, draw_holdout(patients, 0.35, stream(seed)))


def opens(split: Split, **changed: object) -> bool:
    told = {"members": split.members, "nonmembers": split.nonmembers, "salts": split.salts} | changed
    return verify_commitment(split.commitment, **told)


def test_two_studies_of_the_same_patients_hold_out_the_same_people_under_different_commitments():
    """Equal commitments would tell a coordinator of both that nobody came or went in between."""
    first, second = (draw_holdout(PATIENTS, 0.35, stream(), salts=stream().fork("salts", s)) for s in ("a", "b"))
    assert first.nonmembers == second.nonmembers
    assert first.commitment != second.commitment


def test_every_patient_is_on_exactly_one_side_and_the_fraction_is_met() -> None:
    patients = [f"p{i}" for i in range(4000)]
    split = draw_holdout(patients, 0.35, stream())
    assert sorted([*split.members, *split.nonmembers]) == sorted(patients)
    assert abs(len(split.nonmembers) / 4000 - 0.35) < 4 * np.sqrt(0.35 * 0.65 / 4000)


def test_a_patients_side_does_not_depend_on_the_others_or_on_order() -> None:
    whole = draw_holdout(PATIENTS, 0.35, stream())
    assert draw_holdout(PATIENTS[::-1], 0.35, stream()) == whole
    without = draw_holdout(PATIENTS[1:], 0.35, stream())
    assert set(without.members) == set(whole.members) - {PATIENTS[0]}


def test_another_key_draws_another_holdout() -> None:
    assert draw_holdout(PATIENTS, 0.35, stream(0)).members != draw_holdout(PATIENTS, 0.35, stream(1)).members


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_holdout_of_nobody_or_everybody_cannot_be_asked_for(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        draw_holdout(PATIENTS, fraction, stream())
    with pytest.raises(ValueError, match="twice"):
        draw_holdout(["a", "a"], 0.35, stream())


def test_the_commitment_opens_for_the_committed_split_only() -> None:
    split = draw_holdout(PATIENTS, 0.35, stream())
    assert opens(split)
    moved = split.members[0]
    assert not opens(split, members=split.members[1:], nonmembers=tuple(sorted((*split.nonmembers, moved))))
    assert not opens(split, members=split.members[1:])
    fewer = {p: s for p, s in split.salts.items() if p != moved}
    assert not opens(split, members=split.members[1:], salts=fewer)
    assert not opens(split, salts={**split.salts, moved: bytes(32)})
    assert not opens(split, members=(*split.members, split.nonmembers[0]))


def merkle_root(leaves: list[bytes]) -> bytes:
    """Naive tree head: split at the largest power of two below the number of leaves.  [RFC 6962, 2.1]"""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + merkle_root(leaves[:left]) + merkle_root(leaves[left:])).digest()


@pytest.mark.parametrize("count", range(1, 12))
def test_the_commitment_is_the_tree_head_of_the_standard(count: int) -> None:
    split = commit_split([f"m{i:02d}" for i in range(count)], ["h"], stream())
    roles = dict.fromkeys(split.nonmembers, b"N") | dict.fromkeys(split.members, b"M")
    leaves = [hashlib.sha256(b"\x00" + split.salts[p] + p.encode() + roles[p]).digest() for p in sorted(roles)]
    assert split.commitment == merkle_root(leaves).hex()


@settings(max_examples=30, deadline=None)
@given(st.sets(st.text(min_size=1, max_size=4), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_commitments_hold_for_any_names_and_differ_between_splits(names: set[str], chance: object) -> None:
    patients = sorted(names)
    cut = chance.randint(0, len(patients))
    split = commit_split(patients[:cut], patients[cut:], stream())
    assert opens(split)
    flipped = tuple(split.nonmembers), tuple(split.members)
    assert not verify_commitment(split.commitment, members=flipped[0], nonmembers=flipped[1], salts=split.salts)


def test_the_commitment_is_salted_so_that_names_cannot_be_guessed() -> None:
    first, second = (commit_split(["a", "b"], ["c"], stream(seed)) for seed in (0, 1))
    assert first.commitment != second.commitment
    assert all(len(salt) == 32 for salt in first.salts.values())
    assert len(set(first.salts.values())) == 3
    assert first.salts["a"].hex() not in repr(first)
    assert str(first.salts["a"]) not in repr(first)


def test_draws_take_each_member_independently_and_never_a_nonmember() -> None:
    patients, source = cohort(), stream(7)
    draws = [poisson_draw(patients.members, source, 0.3) for _ in range(2000)]
    counts = {p: sum(p in drawn for drawn in draws) for p in patients.patients}
    assert all(counts[p] == 0 for p in patients.nonmembers)
    share = np.array([counts[p] for p in patients.members]) / 2000
    assert np.abs(share - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 2000)
    sizes = np.array([len(drawn) for drawn in draws])
    n = len(patients.members)
    assert sizes.var() == pytest.approx(n * 0.3 * 0.7, rel=0.15)  # a fixed batch size would have no variance
    assert sizes.mean() == pytest.approx(n * 0.3, rel=0.03)


def test_a_draw_may_be_empty_and_consecutive_draws_differ() -> None:
    patients, source = cohort(), stream(3)
    assert poisson_draw(patients.members, source, 1e-9) == []
    assert poisson_draw(patients.members, source, 0.5) != poisson_draw(patients.members, source, 0.5)
    assert poisson_draw(patients.members, source, 1.0) == list(patients.members)


def test_patients_are_sorted_read_only_and_shared_with_the_caller() -> None:
    scans = {p: np.zeros((1, 2, 4, 4, 4), np.float16) for p in ("b", "a")}
    held = Cohort.from_patients(scans, commit_split(["b"], ["a"], stream()))
    assert list(held.patients) == ["a", "b"]
    assert np.shares_memory(held.scans("a"), scans["a"])
    assert held.pair_shape == (2, 4, 4, 4)
    with pytest.raises(ValueError, match="read-only"):
        held.scans("a")[:] = 1


def test_a_cohort_that_contradicts_itself_cannot_exist() -> None:
    good = np.zeros((1, 2, 4, 4, 4), np.float16)
    split = commit_split(["a"], ["b"], stream())
    with pytest.raises(ValueError, match="different patients"):
        Cohort.from_patients({"a": good}, split)
    with pytest.raises(ValueError, match="one shape"):
        Cohort.from_patients({"a": good, "b": good[:, :, :3]}, split)
    with pytest.raises(ValueError, match="one shape"):
        Cohort.from_patients({"a": good[0], "b": good[0]}, split)
    with pytest.raises(ValueError, match="float16"):
        Cohort(patients={"a": good, "b": good.astype(np.float32)}, split=split)
    with pytest.raises(ValueError, match="twice"):
        Split(members=("a",), nonmembers=("a",), commitment="", salts={"a": bytes(32)})
    with pytest.raises(DataError, match="no patient"):
        _ = Cohort.from_patients({}, commit_split([], [], stream())).pair_shape


def test_what_is_stored_is_loaded_bit_for_bit_and_only_its_owner_may_read_it(tmp_path: Path) -> None:
    stored = cohort([*PATIENTS, "ü/../x"])
    stored.store(tmp_path / "cohort.safetensors")
    loaded = Cohort.load(tmp_path / "cohort.safetensors")
    assert loaded.split == stored.split
    assert list(loaded.patients) == list(stored.patients)
    for patient in stored.patients:
        np.testing.assert_array_equal(loaded.scans(patient), stored.scans(patient))
    assert opens(loaded.split)
    assert (tmp_path / "cohort.safetensors").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["cohort.safetensors"]


def test_a_truncated_file_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "cohort.safetensors"
    cohort().store(path)
    whole = path.read_bytes()
    for keep in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(IntegrityError, match="truncated or altered"):
            Cohort.load(path)


def test_one_flipped_bit_anywhere_is_an_integrity_error(tmp_path: Path) -> None:
    path = tmp_path / "cohort.safetensors"
    cohort(PATIENTS[:3]).store(path)
    whole = path.read_bytes()
    for place in [*range(8, len(whole), 97), len(whole) - 1]:
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        try:
            same = Cohort.load(path)
        except IntegrityError:
            continue
        # The header of safetensors may be padded or ordered otherwise; what is loaded must then be the same.
        assert same.split == cohort(PATIENTS[:3]).split


def test_a_store_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cohort.safetensors"
    path.mkdir()  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match="cohort"):
        cohort().store(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cohort.safetensors"]


def test_an_absent_file_is_not_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Cohort.load(tmp_path / "none.safetensors")
