"""The site's executor beside Flower's own Runtime API: what it takes, what it refuses, and what it survives."""

import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.supercore.constant import TaskType
from flwr.supercore.task_identity import TaskIdentity
from local_supernode import APP, SECRET, LocalSuperNode, digest
from small_site import policy, statement_order, train_order
from test_egress_gate import trained
from test_order_worker import FRAME

from client.connection import ConnectionSettings
from client.egress_gate import encoded_bytes
from client.order_worker import OrderWorker
from client.runner import ANSWERED, UNDELIVERABLE, UNKNOWN, Runner
from client.runner_flower import PATIENCE_S, SuperNodeLink, message_from_bytes, message_to_bytes
from common.protocol import codec
from common.protocol.messages import RefusalCode, RefusalReply, Reply, TrainReply
from common.settings.load import settings_yaml
from common.telemetry.security_log import SecurityLog

CANARY = "DOE_JANE-1969"
# Keeps what it was given, and answers with whatever bytes the test has put there.
WORKER = FRAME + (
    "folder = os.environ['TEST_FOLDER']\n"
    'send(b"ready")\n'
    "number = 0\n"
    "while True:\n"
    "    order = take()\n"
    "    number += 1\n"
    "    with open(f'{folder}/new', 'wb') as file:\n"
    "        file.write(order)\n"
    "    os.rename(f'{folder}/new', f'{folder}/order-{number}')\n"
    "    time.sleep(float(open(f'{folder}/seconds').read()))\n"
    "    send(open(f'{folder}/answer', 'rb').read())\n"
)


def refused(code: RefusalCode) -> RefusalReply:
    return RefusalReply(code=code)


@dataclass
class Site:
    """A running runner. told: what was observed of each order, (outcome, kind, bytes)."""

    folder: Path
    node: LocalSuperNode
    told: list[tuple[str, str, int]] = field(default_factory=list)
    runner: Runner | None = None

    def allow(self, **changes: object) -> None:
        facts = {"app_digests": (digest(APP),), "expires": date(2100, 1, 1), **changes}
        (self.folder / "policy.yaml").write_text(settings_yaml(policy(**facts)))

    def answers(self, reply: Reply | RecordDict | bytes, *, seconds: float = 0.0, kind: str = "train.gan") -> None:
        """What the worker will say, and how long it will take. kind: of the order that it answers."""
        if not isinstance(reply, bytes):
            records = reply if isinstance(reply, RecordDict) else codec.encode(reply)
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
            reply = message_to_bytes(Message(records, 7, kind))
        (self.folder / "worker" / "answer").write_bytes(reply)
        (self.folder / "worker" / "seconds").write_text(str(seconds))

    @property
    def orders(self) -> list[Message]:
        """What the worker was given."""
        found = sorted((self.folder / "worker").glob("order-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return [message_from_bytes(path.read_bytes()) for path in found]

    @property
    def security(self) -> list[tuple[str, str, object]]:
        return [(r.operation, r.outcome, r.facts.get("reason")) for r in SecurityLog.of_folder(self.folder).verify()]

    def wait_for_told(self, count: int, limit_s: float = 60.0) -> list[tuple[str, str, int]]:
        end = time.monotonic() + limit_s
        while len(self.told) < count:
            assert time.monotonic() < end, f"only {self.told}"
            time.sleep(0.01)
        return self.told


@pytest.fixture
def node() -> Iterator[LocalSuperNode]:
    with LocalSuperNode() as node:
        yield node


@pytest.fixture
def started(tmp_path: Path, node: LocalSuperNode) -> Iterator[Callable[..., Site]]:
    """started(**settings) -> a runner that takes orders of `node`, with a policy that names the bundle APP."""
    stopped = threading.Event()
    threads: list[threading.Thread] = []
    links: list[SuperNodeLink] = []

    def start(*, secret: bytes = SECRET, patience_s: float = PATIENCE_S, **settings: object) -> Site:
        (tmp_path / "worker").mkdir()
        site = Site(folder=tmp_path, node=node)
        site.allow()
        site.answers(trained())
        worker = OrderWorker(
            (sys.executable, "-c", WORKER),
            environment={**os.environ, "TEST_FOLDER": str(tmp_path / "worker")},
            log=tmp_path / "log" / "worker.log",
        )
        links.append(SuperNodeLink(node.address, secret, patience_s=patience_s))
        site.runner = Runner(
            tmp_path,
            link=links[-1],
            worker=worker,
            settings=ConnectionSettings.model_validate(settings),
            observe=lambda outcome, kind, size, _seconds: site.told.append((outcome, kind, size)),
        )
        threads.append(threading.Thread(target=site.runner.run, args=(stopped,)))
        threads[-1].start()
        return site

    yield start
    stopped.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for link in links:
        link.close()


def test_an_approved_order_reaches_the_worker_as_it_came_and_its_reply_leaves(started, node):
    site = started()
    task = node.give(train_order())
    (answer,) = node.replies()
    assert isinstance(codec.decode_reply(answer.content), TrainReply)
    assert answer.content == codec.encode(trained())
    (order,) = site.orders
    assert codec.decode_order(order.content).weights_digest == train_order().weights_digest
    assert answer.metadata.reply_to_message_id == order.metadata.message_id != ""
    assert site.wait_for_told(1) == [(ANSWERED, "train", encoded_bytes(answer.content))]
    ended = node.task(task).status  # told after that
    assert (ended.status, ended.sub_status, ended.details) == ("finished", SubStatus.COMPLETED, "")
    assert [context.run_config for context in node.contexts()] == [{"run": "evil"}]  # as given: none was sent back
    assert site.security == []


def test_one_worker_answers_order_after_order(started, node):
    site = started()
    for number in (1, 2, 3):
        site.answers(trained(number))
        node.give(train_order(number))
        assert node.reply().round == number
    assert len(site.orders) == 3  # numbered by one process: a second one would begin at 1 again
    assert site.runner.is_ready()


def test_a_runner_is_ready_when_supernode_worker_and_policy_are(started, node):
    site = started()
    end = time.monotonic() + 60
    while not site.runner.is_ready():
        assert time.monotonic() < end
        time.sleep(0.05)
    site.allow(expires=date(2020, 1, 1))
    assert not site.runner.is_ready()


# --- what is refused --------------------------------------------------------------------------------------------------


def evil_bundle(mark: Path) -> bytes:
    """A Flower app whose code leaves a mark when it is imported."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("client/app.py", "client/__init__.py", "common/__init__.py"):
            archive.writestr(name, f"open({str(mark)!r}, 'w').write('imported')")
        archive.writestr("pyproject.toml", '[tool.flwr.app.components]\nclientapp = "client.app:app"\n')
    return buffer.getvalue()


def test_a_foreign_app_is_refused_and_logged_and_nothing_of_it_is_unpacked(started, node, tmp_path):
    site = started()
    bundle = evil_bundle(tmp_path / "mark")
    before = {path for path in tmp_path.rglob("*") if "log" not in path.parts}
    node.give(train_order(), bundle=bundle)
    assert node.reply() == refused(RefusalCode.POLICY)
    assert site.wait_for_told(1)[0][:2] == ("policy", "train")
    assert site.orders == []
    (record,) = SecurityLog.of_folder(tmp_path).verify()
    assert (record.operation, record.outcome) == ("task", "refused")
    assert record.facts["app_digest"] == digest(bundle)
    assert {path for path in tmp_path.rglob("*") if path.name not in {"log", "security.jsonl", "worker.log"}} == before
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)


def test_a_bundle_is_known_by_its_content_and_not_by_what_it_is_called(started, node):
    site = started()
    node.give(train_order(), bundle=b"another", stated=digest(APP))
    assert node.reply() == refused(RefusalCode.POLICY)
    node.give(train_order(), bundle=APP, stated=digest(b"another"))
    assert node.reply() == refused(RefusalCode.POLICY)
    assert site.orders == []


def test_a_task_that_is_not_for_a_client_app_is_refused_so_that_the_supernode_is_free_again(started, node):
    site = started()
    node.give(train_order(), kind=TaskType.AGENT_APP)
    assert node.reply() == refused(RefusalCode.POLICY)
    assert site.orders == []
    assert site.security == [("task", "refused", "a task of kind flwr-agentapp is not one for a site")]
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)


@pytest.mark.parametrize("text", [None, "studies: [", "epsilon_cap: high\n"])
def test_without_a_policy_that_can_be_read_everything_is_refused_and_the_site_stays_up(started, node, text):
    site = started()
    file = site.folder / "policy.yaml"
    good = file.read_text()
    file.unlink() if text is None else file.write_text(text)
    for _ in range(2):
        node.give(train_order())
        assert node.reply() == refused(RefusalCode.POLICY)
    assert site.orders == []
    assert site.security == [("task", "refused", "the policy cannot be read")] * 2
    file.write_text(good)
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)


def test_one_changed_byte_in_the_approved_digest_revokes_and_changing_it_back_approves(started, node):
    site = started()
    file = site.folder / "policy.yaml"
    good, approved = file.read_text(), digest(APP)
    changed = approved[:-1] + ("0" if approved[-1] != "0" else "1")
    file.write_text(good.replace(approved, changed))
    node.give(train_order())
    assert node.reply() == refused(RefusalCode.POLICY)
    file.write_text(good)
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)


@pytest.mark.parametrize("kind", ["query.secrets", "train", "evaluate.gan"])
def test_a_message_of_no_known_kind_does_not_reach_the_worker(started, node, kind):
    site = started()
    node.give(codec.encode(train_order()), kind)
    assert node.reply() == refused(RefusalCode.STALE)
    assert site.orders == []
    assert site.wait_for_told(1)[0][:2] == ("stale", UNKNOWN)


def test_a_message_whose_objects_are_garbage_is_refused(started, node):
    node.give(train_order())
    node.lose_objects()
    site = started()
    assert node.reply() == refused(RefusalCode.STALE)
    assert site.orders == []


def test_a_message_that_the_supernode_stopped_fetching_is_given_up_and_the_next_is_worked_on(started, node):
    node.give(train_order(), run_id=1)
    node.never_fetch()
    site = started(patience_s=1.0)
    assert node.reply() == refused(RefusalCode.STALE)
    node.give(train_order(), run_id=2)
    assert isinstance(node.reply(), TrainReply)
    assert len(site.orders) == 1


def test_a_runner_with_another_secret_gets_no_task(started, node):
    site = started(secret=b"x" * 32)
    task = node.give(train_order())
    time.sleep(1.5)
    assert node.task(task).status.status == "pending"
    assert not site.runner.is_ready()


# --- what may not leave -----------------------------------------------------------------------------------------------


def not_a_number() -> RecordDict:
    records = codec.encode(trained())
    weights = records.array_records["weights"]
    name = next(iter(weights))
    values = weights[name].numpy().copy()
    values.flat[0] = np.nan
    weights[name] = Array(values)
    return records


def with_notes() -> RecordDict:
    records = codec.encode(trained())
    records["notes"] = ConfigRecord({"patient": CANARY})
    return records


@pytest.mark.parametrize("make", [not_a_number, with_notes, lambda: codec.encode(trained(2))])
def test_what_the_worker_may_not_say_is_held_back_by_the_runner_and_noted(started, node, make):
    site = started()
    site.answers(make())
    node.give(train_order())
    (answer,) = node.replies()
    assert answer.content == codec.encode(refused(RefusalCode.INTERNAL))
    assert CANARY not in repr((answer.metadata, answer.content))
    assert [entry[:2] for entry in site.security] == [("egress", "held-back"), ("order", "refused")]
    assert site.wait_for_told(1)[0][:2] == ("internal", "train")


def test_an_error_text_of_the_workers_message_never_leaves(started, node):
    site = started()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    error = Message(Error(code=0, reason=f"/data/{CANARY}"), reply_to=Message(RecordDict(), 7, "train.gan"))
    site.answers(message_to_bytes(error))
    node.give(train_order())
    (answer,) = node.replies()
    assert not answer.has_error()
    assert answer.content == codec.encode(refused(RefusalCode.INTERNAL))


def test_a_rate_of_replies_is_kept_over_orders(started, node):
    site = started(replies_per_minute=1)
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)
    site.answers(trained(2))
    node.give(train_order(2))
    assert node.reply() == refused(RefusalCode.INTERNAL)


# --- what it survives -------------------------------------------------------------------------------------------------


def test_garbage_of_the_worker_costs_one_order(started, node):
    site = started()
    site.answers(b"\xff" * 100)
    node.give(train_order())
    assert node.reply() == refused(RefusalCode.INTERNAL)
    site.answers(trained(2))
    node.give(train_order(2))
    assert node.reply().round == 2


def test_an_order_that_takes_too_long_is_refused_and_the_next_is_worked_on(started, node):
    site = started(order_limit_s=3.0)
    site.answers(trained(), seconds=300)
    node.give(train_order())
    assert node.reply() == refused(RefusalCode.INTERNAL)
    site.answers(trained(2))
    node.give(train_order(2))
    assert node.reply().round == 2


def test_a_message_that_is_there_a_little_after_its_task_is_waited_for(started, node):
    started()
    node.give(train_order(), late_s=0.8)
    assert isinstance(node.reply(), TrainReply)


def test_a_supernode_that_is_started_again_is_served_again(started, node):
    site = started()
    node.give(train_order())
    assert isinstance(node.reply(), TrainReply)
    node.__exit__()
    end = time.monotonic() + 60
    while site.runner.is_ready():
        assert time.monotonic() < end, "ten seconds without contact are too long"
        time.sleep(0.1)
    with LocalSuperNode(port=node.port) as again:
        site.answers(trained(2))
        again.give(train_order(2))
        assert again.reply().round == 2
        assert site.runner.is_ready()


def test_a_supernode_that_goes_away_in_the_middle_loses_the_order_and_nothing_else(started, node):
    site = started()
    site.answers(trained(), seconds=1.5)
    node.give(train_order())
    end = time.monotonic() + 60
    while not site.orders:
        assert time.monotonic() < end
        time.sleep(0.01)
    node.__exit__()
    with LocalSuperNode(port=node.port) as again:
        assert site.wait_for_told(1)[0] == (UNDELIVERABLE, "train", 0)
        site.answers(trained(2))
        again.give(train_order(2))
        assert again.reply().round == 2
    assert len(site.orders) == 2  # the worker lived on


def test_stopping_does_not_wait_for_an_order(started, node):
    site = started()
    site.answers(trained(), seconds=300)
    node.give(train_order())
    end = time.monotonic() + 60
    while not site.orders:
        assert time.monotonic() < end
        time.sleep(0.01)
    # The fixture stops it, and waits for no more than a minute.


def test_the_runner_holds_no_training_code():
    program = (
        "import sys, client.runner\n"
        "print([name for name in ('torch', 'opacus', 'monai', 'nibabel', 'client.app', 'client.site') "
        "if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_a_statement_is_asked_like_any_order(started, node):
    site = started()
    site.answers(refused(RefusalCode.PAUSED), kind="query.statement")
    node.give(statement_order())
    assert node.reply() == refused(RefusalCode.PAUSED)
    assert site.wait_for_told(1)[0][:2] == ("paused", "statement")
