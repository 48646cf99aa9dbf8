"""A file or folder appears whole, or the old state stays."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import ConsiliumError, UsageError
from common.evidence.atomic import whole_folder, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The operating system refuses to let any file grow past `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced_whole_with_the_permissions_asked_for(tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    write_atomic(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["state.json"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "state.json"
    path.write_bytes(b"old")
    with no_file_above(1000), pytest.raises(OSError, match="File too large"):
        write_atomic(path, bytes(5000))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state.json"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path):
    target = tmp_path / "release"
    with whole_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_bytes(b"a")
        assert not target.exists()
    assert (target / "sub" / "a").read_bytes() == b"a"
    assert names(tmp_path) == ["release"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_leaves_no_trace(tmp_path: Path, failure: type[BaseException]):
    with pytest.raises(failure), whole_folder(tmp_path / "release") as part:  # noqa: PT012
        (part / "a").write_bytes(b"a")
        raise failure
    assert names(tmp_path) == []


def test_a_full_disk_in_a_folder_is_one_clear_error_and_leaves_no_trace(tmp_path: Path):
    target = tmp_path / "release"
    with pytest.raises(ConsiliumError, match=r"release could not be written \(File too large\).*nothing was left"):  # noqa: SIM117
        with no_file_above(1000), whole_folder(target) as part:
            (part / "a").write_bytes(bytes(5000))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_by_the_next(tmp_path: Path):
    left = tmp_path / ".release.part"
    (left / "sub").mkdir(parents=True)
    (left / "sub" / "stale").write_bytes(b"half")
    with whole_folder(tmp_path / "release") as part:
        (part / "a").write_bytes(b"a")
    assert names(tmp_path) == ["release"]
    assert names(tmp_path / "release") == ["a"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path):
    target = tmp_path / "release"
    with whole_folder(target) as part:
        (part / "a").write_bytes(b"a")
        with pytest.raises(UsageError, match="another process"), whole_folder(target):
            pass
    assert names(target) == ["a"]


def test_a_folder_that_holds_something_is_never_overwritten(tmp_path: Path):
    (tmp_path / "mine").write_bytes(b"precious")
    with pytest.raises(UsageError, match="already holds something"), whole_folder(tmp_path):
        pass
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "release").mkdir()
    with whole_folder(tmp_path / "release") as part:
        (part / "a").write_bytes(b"a")
    assert names(tmp_path / "release") == ["a"]
