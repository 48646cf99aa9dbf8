"""Processes that we start: watched, started again, and ended with everything below them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.errors import UsageError
from common.processes import Child, Supervisor, alive, below, end_all, left_of, recorded_pids, seen, stop_process

# Starts a grandchild in a session of its own, writes its id, and waits.
PARENT = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
time.sleep(60)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)


def child(tmp_path: Path, code: str, *arguments: str, again: float | None = None, name: str = "one") -> Child:
    return Child(
        name=name,
        argv=(sys.executable, "-c", code, *arguments),
        env=dict(os.environ),
        log=tmp_path / "log" / f"{name}.log",
        restart_after_s=again,
    )


def wait_for(fact: Callable[[], object], limit_s: float = 10.0) -> None:
    end = time.monotonic() + limit_s
    while not fact():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def number(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """The grandchild's id, once it is written; the grandchild is ended in any case."""
    file = tmp_path / "pid"

    def read() -> int:
        wait_for(lambda: file.exists() and file.read_text())
        return int(file.read_text())

    yield read
    if file.exists():
        end_all([found for found in [seen(int(file.read_text()))] if found], wait_s=1)


def test_a_process_ends_with_its_grandchild_in_another_session(tmp_path: Path, number: Callable[[], int]) -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "pid")])
    grandchild = seen(number())
    assert grandchild in below(process.pid)
    stop_process(process)
    assert process.returncode == -signal.SIGTERM
    assert grandchild is not None
    assert not alive(grandchild)


def test_a_process_that_does_not_listen_is_killed_after_the_wait() -> None:
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        stop_process(process, wait_s=0.2)
    assert process.returncode == -signal.SIGKILL


def test_an_id_that_went_to_another_process_is_left_alone() -> None:
    ours = seen(os.getpid())
    assert ours is not None
    assert alive(ours)
    stranger = type(ours)(ours.pid, "at another time")
    assert not alive(stranger)
    end_all([stranger])  # would end this very test run


def test_a_zombie_does_not_live() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    running = seen(process.pid)
    assert running is not None
    process.kill()
    wait_for(lambda: not alive(running))
    process.wait()


def test_a_child_is_started_again_after_its_wait_and_not_before(tmp_path: Path) -> None:
    now = [0.0]
    supervisor = Supervisor([child(tmp_path, "print('here'); raise SystemExit(3)", again=15)], clock=lambda: now[0])
    with supervisor:
        supervisor.start()
        wait_for(lambda: not supervisor.running("one"))
        (ended,) = supervisor.poll()
        assert (ended.name, ended.code) == ("one", 3)
        now[0] = 14.9
        assert supervisor.poll() == ()
        assert (tmp_path / "log" / "one.log").read_text().count("here") == 1
        now[0] = 15.0
        supervisor.poll()
        wait_for(lambda: (tmp_path / "log" / "one.log").read_text().count("here") == 2)


def test_a_child_without_a_wait_is_not_started_again(tmp_path: Path) -> None:
    with Supervisor([child(tmp_path, "raise SystemExit(0)")]) as supervisor:
        supervisor.start()
        wait_for(lambda: not supervisor.running("one"))
        assert [ended.code for ended in supervisor.poll()] == [0]
        assert supervisor.poll() == ()
        assert supervisor.pids == {}


def test_stop_ends_what_a_killed_child_left_behind(tmp_path: Path, number: Callable[[], int]) -> None:
    supervisor = Supervisor([child(tmp_path, PARENT, str(tmp_path / "pid"))])
    supervisor.start()
    orphan = seen(number())
    supervisor.poll()
    os.kill(supervisor.pids["one"], signal.SIGKILL)
    wait_for(lambda: not supervisor.running("one"))
    assert orphan is not None
    assert alive(orphan)
    supervisor.stop()
    assert not alive(orphan)


NGINX = PARENT.replace(", start_new_session=True", "")  # its workers stay in its session


def test_a_killed_child_s_workers_that_nobody_had_seen_are_found_by_its_session(
    tmp_path: Path, number: Callable[[], int]
) -> None:
    """nginx starts another worker for one that ended: one second before it is killed itself, nobody has seen that."""
    record = tmp_path / "pids.json"
    supervisor = Supervisor([child(tmp_path, NGINX, str(tmp_path / "pid"))], record=record)
    supervisor.start()
    worker = seen(number())
    assert worker is not None
    assert str(worker.pid) not in record.read_text()
    os.kill(supervisor.pids["one"], signal.SIGKILL)
    wait_for(lambda: not supervisor.running("one"))
    assert supervisor.orphans("one") == {worker}
    supervisor.stop()
    assert not alive(worker)

    # The same for a supervisor that was killed together with its child: the next one finds the record.
    (tmp_path / "pid").unlink()
    supervisor = Supervisor([child(tmp_path, NGINX, str(tmp_path / "pid"))], record=record)
    supervisor.start()
    worker, text = seen(number()), record.read_text()
    leader = seen(supervisor.pids["one"])
    os.kill(supervisor.pids["one"], signal.SIGKILL)
    wait_for(lambda: not supervisor.running("one"))
    assert leader is not None
    assert worker is not None
    other = tmp_path / "other.json"
    other.write_text(text)
    with Supervisor([], record=other):
        assert not alive(worker)
    supervisor.stop()


def test_an_id_that_leads_another_session_now_or_came_before_a_reboot_has_left_nobody() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    leader = seen(process.pid)
    assert leader is not None
    assert left_of(leader) == {leader}
    assert left_of(type(leader)(leader.pid, leader.began + "0")) == frozenset()
    stop_process(process)
    assert left_of(leader) == frozenset()
    assert left_of(type(leader)(os.getsid(0), "an earlier boot 12")) == frozenset()


def test_the_next_supervisor_ends_what_a_killed_one_left_running(tmp_path: Path) -> None:
    record = tmp_path / "pids.json"
    killed = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\nfrom pathlib import Path\nfrom common.processes import Child, Supervisor\n"
            "run = Child(name='one', argv=(sys.executable, '-c', 'import time; time.sleep(60)'),\n"
            "            env=dict(os.environ), log=Path(sys.argv[1]).with_name('one.log'))\n"
            "Supervisor([run], record=Path(sys.argv[1])).start()\ntime.sleep(60)",
            str(record),
        ]
    )
    wait_for(lambda: recorded_pids(record))
    left = seen(recorded_pids(record)["one"])
    killed.kill()
    killed.wait()
    assert left is not None
    assert alive(left)
    with Supervisor([child(tmp_path, "import time; time.sleep(60)")], record=record) as supervisor:
        assert not alive(left)
        supervisor.start()
        assert recorded_pids(record) == supervisor.pids
    assert recorded_pids(record) == {}


def test_two_supervisors_do_not_serve_the_same_folder(tmp_path: Path) -> None:
    record = tmp_path / "pids.json"
    with Supervisor([], record=record), pytest.raises(UsageError, match="served by another process already"):
        Supervisor([], record=record)
    Supervisor([], record=record).stop()


def test_a_damaged_record_is_no_obstacle(tmp_path: Path) -> None:
    record = tmp_path / "pids.json"
    for text in ("", "[]", '{"one": 3}', '{"one": [[1]]}', "no json"):
        record.write_text(text)
        assert recorded_pids(record) == {}
        Supervisor([], record=record).stop()
        assert not record.exists()
