"""The chain shows every edit, and loses nothing that it acknowledged."""

import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import VerificationFailed
from common.evidence.chain import GENESIS, EvidenceChain, read_chain

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def three_records(path: Path) -> EvidenceChain:
    chain = EvidenceChain(path)
    for number in range(3):
        chain.append("round", {"round": number, "sites": ["site-1", "site-2"]}, NOW)
    return chain


def test_records_come_back_in_order_and_the_head_is_the_last(tmp_path: Path):
    chain = EvidenceChain(tmp_path / "evidence.jsonl")
    assert chain.head == GENESIS
    first = chain.append("enrolled", {"sites": 3}, NOW)
    second = chain.append("round", {"round": 1}, NOW)
    assert [r.kind for r in chain.verify()] == ["enrolled", "round"]
    assert second.previous == first.digest
    assert chain.head == second.digest


def test_another_object_on_the_same_file_continues_the_same_chain(tmp_path: Path):
    three_records(tmp_path / "evidence.jsonl")
    record = EvidenceChain(tmp_path / "evidence.jsonl").append("audit", {}, NOW)
    assert record.index == 3
    assert len(EvidenceChain(tmp_path / "evidence.jsonl").verify()) == 4


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found_and_its_line_named(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "evidence.jsonl"
    if not path.exists():
        three_records(path)
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VerificationFailed, match=r"evidence\.jsonl"):
        read_chain(bytes(bad), "evidence.jsonl")


def test_a_removed_or_moved_record_is_found(tmp_path: Path):
    path = tmp_path / "evidence.jsonl"
    three_records(path)
    a, b, c = path.read_bytes().splitlines(keepends=True)
    for forged in (a + c, b + c, a + c + b, a + b + b + c):
        with pytest.raises(VerificationFailed, match="removed or moved"):
            read_chain(forged, "evidence.jsonl")


def test_a_cut_end_holds_as_a_chain_but_changes_the_head(tmp_path: Path):
    chain = three_records(tmp_path / "evidence.jsonl")
    whole = chain.head
    lines = chain.path.read_bytes().splitlines(keepends=True)
    chain.path.write_bytes(b"".join(lines[:2]))
    assert len(chain.verify()) == 2
    assert chain.head != whole


def test_a_line_torn_by_a_crash_is_dropped_and_the_chain_goes_on(tmp_path: Path):
    chain = three_records(tmp_path / "evidence.jsonl")
    last = chain.path.read_bytes().splitlines(keepends=True)[-1]
    with chain.path.open("ab") as stream:
        stream.write(last[: len(last) // 2])
    assert len(chain.verify()) == 3
    assert chain.append("round", {"round": 3}, NOW).index == 3
    assert len(read_chain(chain.path.read_bytes(), "evidence.jsonl")) == 4


def test_a_torn_line_in_a_bundle_is_refused():
    with pytest.raises(VerificationFailed, match="cut off"):
        read_chain(b'{"body":', "evidence.jsonl")


def test_a_broken_chain_is_not_continued(tmp_path: Path):
    chain = three_records(tmp_path / "evidence.jsonl")
    chain.path.write_bytes(chain.path.read_bytes().replace(b'"round":1', b'"round":9'))
    before = chain.path.read_bytes()
    with pytest.raises(VerificationFailed, match="line 2: was changed"):
        chain.append("round", {"round": 3}, NOW)
    assert chain.path.read_bytes() == before


def test_a_full_disk_leaves_the_chain_as_it_was(tmp_path: Path):
    chain = three_records(tmp_path / "evidence.jsonl")
    before = chain.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match=r"File too large|No space left"):
            chain.append("round", {"round": 3}, NOW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert chain.path.read_bytes() == before
    assert chain.append("round", {"round": 3}, NOW).index == 3


def test_parallel_appends_make_one_chain(tmp_path: Path):
    path = tmp_path / "evidence.jsonl"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: EvidenceChain(path).append("round", {"round": n}, NOW), range(12)))
    records = EvidenceChain(path).verify()
    assert sorted(r.body["round"] for r in records) == list(range(12))


@pytest.mark.parametrize("body", [{"epsilon": float("nan")}, {"epsilon": float("inf")}, {"n": 2**60}])
def test_a_body_without_canonical_form_is_refused_before_anything_is_written(tmp_path: Path, body: dict[str, float]):
    chain = three_records(tmp_path / "evidence.jsonl")
    with pytest.raises(ValueError, match=r"JCS|domain"):
        chain.append("round", body, NOW)
    assert len(chain.verify()) == 3


def test_a_time_without_zone_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="time zone"):
        EvidenceChain(tmp_path / "e.jsonl").append("round", {}, datetime(2026, 11, 20))
