"""The process that works on orders: kept as long as it behaves, ended when it does not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from small_site import enrol_order, statement_order, train_order
from test_app import write_site

from client.order_worker import OrderWorker, WorkerFailed, worker_command
from client.runner import worker_environment
from client.runner_flower import message_from_bytes, message_to_bytes
from common.errors import ProtocolError
from common.processes import alive, seen
from common.protocol import codec
from common.protocol.messages import EnrolReply, Order, RefusalCode, RefusalReply, Reply, StatementReply, TrainReply

# A worker without torch: `reply` stands for what it does with an order.
FRAME = """
import os, socket, struct, sys, time
stream = socket.socket(fileno=int(sys.argv[1])).makefile("rwb")
def send(data, length=None):
    stream.write(struct.pack(">Q", len(data) if length is None else length) + data)
    stream.flush()
def take():
    head = stream.read(8)
    return stream.read(struct.unpack(">Q", head)[0]) if head else sys.exit(0)
"""
ECHO = FRAME + 'send(b"ready")\nwhile True: send(str(os.getpid()).encode() + b":" + take())\n'


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], OrderWorker]]:
    """started(program) -> a worker of that program; ended with the test."""
    workers: list[OrderWorker] = []

    def start(program: str) -> OrderWorker:
        command = (sys.executable, "-c", program)
        workers.append(OrderWorker(command, environment=dict(os.environ), log=tmp_path / "worker.log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


def pid_of(worker: OrderWorker) -> int:
    return int(worker.answer(b"", 60).partition(b":")[0])


def test_one_process_answers_one_order_after_the_other(started):
    worker = started(ECHO)
    answers = [worker.answer(text, 60) for text in (b"a", b"", b"b" * 2**20)]
    pids = {answer.partition(b":")[0] for answer in answers}
    assert [answer.partition(b":")[2] for answer in answers] == [b"a", b"", b"b" * 2**20]
    assert len(pids) == 1
    assert worker.ready


def test_an_order_that_takes_too_long_ends_the_worker_and_the_next_starts_another(started, tmp_path):
    program = FRAME + (
        'send(b"ready")\n'
        "while True:\n"
        "    order = take()\n"
        '    time.sleep(60) if order == b"slow" else send(str(os.getpid()).encode() + b":")\n'
    )
    worker = started(program)
    first = seen(pid_of(worker))
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match="longer than the site allows"):
        worker.answer(b"slow", 0.5)
    assert 0.4 < time.monotonic() - began < 30
    assert first is not None
    assert not alive(first)
    assert not worker.ready
    assert pid_of(worker) != first.pid


@pytest.mark.parametrize(
    ("does", "told", "limit_s"),
    [
        ("sys.exit(3)", "ended while it worked", 60),
        ("os.kill(os.getpid(), 9)", "ended while it worked", 60),
        ('stream.write(b"gar"); stream.flush(); sys.exit(0)', "ended while it worked", 60),
        ('send(b"", 2**63)', "more than any reply has", 60),
        ('send(b"half", 100); sys.exit(0)', "ended while it worked", 60),
        ('send(b"half", 100); time.sleep(60)', "longer than the site allows", 0.5),
    ],
    ids=["exit", "killed", "garbage", "huge", "torn", "half"],
)
def test_a_worker_that_does_not_answer_properly_is_ended_and_replaced(started, does, told, limit_s):
    worker = started(FRAME + f'send(b"ready")\ntake()\n{does}\n')
    for _ in range(2):
        worker.wait_until_ready(60)
        with pytest.raises(WorkerFailed, match=told):
            worker.answer(b"order", limit_s)
        assert not worker.ready


def test_a_worker_that_dies_between_two_orders_is_started_again(started):
    worker = started(ECHO)
    first = seen(pid_of(worker))
    assert first is not None
    os.kill(first.pid, signal.SIGKILL)
    end = time.monotonic() + 60
    while worker.ready:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert pid_of(worker) != first.pid


def test_a_worker_that_cannot_start_is_told_and_not_taken_for_one(started):
    with pytest.raises(WorkerFailed, match="ended while it"):
        started("raise SystemExit(1)").wait_until_ready(60)
    with pytest.raises(WorkerFailed, match="something else than its readiness"):
        started(FRAME + 'send(b"hello")\ntake()\n').wait_until_ready(60)
    with pytest.raises(WorkerFailed, match="longer than"):
        started("import time; time.sleep(60)").wait_until_ready(0.5)


def test_an_order_is_given_up_when_the_runner_is_stopped(started):
    worker = started(FRAME + 'send(b"ready")\ntake()\ntime.sleep(60)\n')
    worker.wait_until_ready(60)
    stopped = threading.Event()
    threading.Timer(0.3, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match="being stopped"):
        worker.answer(b"order", 60, stopped.is_set)
    assert time.monotonic() - began < 30


def test_a_worker_has_no_proxy_to_call_through():
    given = {"PATH": "/bin", "https_proxy": "http://p:1", "HTTP_PROXY": "http://p:1", "ALL_PROXY": "x", "no_proxy": "y"}
    assert worker_environment(given) == {"PATH": "/bin"}


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff", b"x" * 1000])
def test_bytes_that_are_no_message_are_a_protocol_error_and_nothing_else(data):
    with pytest.raises(ProtocolError):
        message_from_bytes(data)


# --- the real worker ----------------------------------------------------------------------------------------------


def frame_of(order: Order) -> bytes:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    return message_to_bytes(Message(codec.encode(order), 7, codec.message_type(order)))


def reply_in(data: bytes) -> Reply:
    return codec.decode_reply(message_from_bytes(data).content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site of phantoms."""
    folder = tmp_path_factory.mktemp("site")
    write_site(folder)
    return folder


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[OrderWorker]:
    """Its worker as the runner starts it. The tests that share it show that one process answers them all."""
    worker = OrderWorker(
        worker_command(folder / "site.yaml"),
        environment=worker_environment(os.environ),
        log=folder / "log" / "worker.log",
    )
    worker.wait_until_ready(300)
    process = worker.process_id
    yield worker
    assert worker.process_id == process, "torch was imported more than once"
    worker.stop()
    assert (folder / "log" / "worker.log").read_text() == ""
    told = [json.loads(line) for line in (folder / "log" / "worker.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in told} == {"ProtocolError", "SettingsError"}
    assert "DOE_JANE" not in repr(told)


@pytest.mark.slow
def test_the_real_worker_answers_order_after_order(real):
    assert isinstance(reply_in(real.answer(frame_of(enrol_order()), 120)), EnrolReply)
    for number in (1, 2):
        assert isinstance(reply_in(real.answer(frame_of(train_order(number)), 120)), TrainReply)
    assert isinstance(reply_in(real.answer(frame_of(statement_order()), 120)), StatementReply)


@pytest.mark.slow
def test_the_real_worker_outlives_what_is_no_order(real):
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    empty = message_to_bytes(Message(RecordDict(), 7, "train.gan"))
    for _ in range(2):
        assert reply_in(real.answer(empty, 120)) == RefusalReply(code=RefusalCode.STALE)


@pytest.mark.slow
def test_the_real_worker_says_nothing_about_a_site_that_it_cannot_read(real, folder):
    file = folder / "site.yaml"
    good = file.read_text()
    try:
        file.write_text("site: DOE_JANE\n")
        answer = message_from_bytes(real.answer(frame_of(enrol_order()), 120))
    finally:
        file.write_text(good)
    assert codec.decode_reply(answer.content) == RefusalReply(code=RefusalCode.INTERNAL)
    assert str(folder) not in repr((answer.metadata, answer.content))
    assert "DOE_JANE" not in repr((answer.metadata, answer.content))


@pytest.mark.slow
def test_the_real_worker_obeys_a_policy_that_was_changed_by_one_byte_and_a_pause(real, folder):
    assert isinstance(reply_in(real.answer(frame_of(enrol_order()), 120)), EnrolReply)
    file, digest = folder / "policy.yaml", enrol_order().study_digest
    good = file.read_text()
    file.write_text(good.replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    assert reply_in(real.answer(frame_of(statement_order()), 120)) == RefusalReply(code=RefusalCode.POLICY)
    file.write_text(good)
    assert isinstance(reply_in(real.answer(frame_of(statement_order()), 120)), StatementReply)
    paused = folder / "state" / "paused"
    paused.touch()
    assert reply_in(real.answer(frame_of(statement_order()), 120)) == RefusalReply(code=RefusalCode.PAUSED)
    paused.unlink()
    assert isinstance(reply_in(real.answer(frame_of(statement_order()), 120)), StatementReply)


@pytest.mark.slow
def test_the_real_worker_ends_when_its_runner_is_killed(folder, tmp_path):
    program = (
        "import os, sys, time\nfrom pathlib import Path\nfrom client.order_worker import OrderWorker, worker_command\n"
        "worker = OrderWorker(worker_command(Path(sys.argv[1])), environment=dict(os.environ), "
        "log=Path(sys.argv[2]))\n"
        "worker.wait_until_ready(300)\nprint(worker.process_id, flush=True)\ntime.sleep(120)\n"
    )
    command = [sys.executable, "-c", program, str(folder / "site.yaml"), str(tmp_path / "worker.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as runner:
        try:
            assert runner.stdout is not None
            worker = seen(int(runner.stdout.readline()))
            assert worker is not None
            assert alive(worker)
        finally:
            runner.kill()
    end = time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < end
        time.sleep(0.05)
