"""The Flower ClientApp of a hospital: decode the order, let `Site` answer, encode the reply.

Which site this is
- a hospital: its own node configuration names the file (`--node-config 'site="/srv/consilium/site.yaml"'`);
- simulation: the run configuration names the folder of all sites, the partition number picks one. The run
  configuration comes from the coordinator, so a site that is found this way must be a simulated one.

What leaves is decided more than once. `Site` checks its reply, and `egress` checks the encoded message by the gate
that a hospital's runner applies again outside this process. What is not a declared reply, an exception included,
leaves as a fixed refusal. Flower would send the text of an exception to the coordinator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import structlog
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.egress_gate import BytesOut, gate, read_order, refusal
from client.site import Site
from client.site_folder import POLICY_FILE, SITE_FILE
from common.errors import PolicyRefusal, ProtocolError, UsageError
from common.protocol import codec
from common.protocol.messages import RefusalCode
from common.telemetry.logs import reason_of

LARGEST_PROCESS_SITES = 256  # simulated sites whose settings one process keeps parsed

log = structlog.get_logger(__name__)

Handler = Callable[[Message, Context], Message]


def egress(message: Message, context: Context, call_next: Handler) -> Message:
    """Flower mod: let a declared reply to this very order pass, and a fixed refusal in place of anything else."""
    try:
        reply = call_next(message, context)
    except Exception as error:  # noqa: BLE001  # the outermost boundary: Flower would send the text
        _note(error)
        return refusal(message, RefusalCode.INTERNAL)
    return gate(message, reply, BytesOut())  # counted anew for each: what left before is for the runner to know


app = ClientApp(mods=[egress])


def answer(message: Message, context: Context) -> Message:
    """Answer one order. The message types share this function: the order says what it is."""
    try:
        order = read_order(message)
    except ProtocolError as error:
        _note(error)
        return refusal(message, RefusalCode.STALE)
    return Message(codec.encode(_site(context).handle(order)), reply_to=message)


# Calls, not decorators: one function answers them all, and mypy cannot see through Flower's decorators.
app.query("enrol")(answer)
app.train("warm_up")(answer)
app.train("gan")(answer)
app.query("course")(answer)
app.query("canaries")(answer)
app.query("score")(answer)
app.query("utility")(answer)
app.query("statement")(answer)


def _site(context: Context) -> Site:
    """Return the site of this node. Raises UsageError without one, PolicyRefusal if a coordinator named a real one."""
    own = context.node_config.get("site")
    if own is not None:
        return _open(Path(str(own)))
    folder, partition = context.run_config.get("sites"), context.node_config.get("partition-id")
    if not folder or partition is None:
        raise UsageError(
            "this node is no site: its node configuration has no `site`. "
            "Start the SuperNode with --node-config 'site=\"/path/to/site.yaml\"'."
        )
    site = _open(Path(str(folder)) / f"site-{int(partition) + 1}" / SITE_FILE)
    if not site.simulated:
        raise PolicyRefusal("a coordinator named the folder of a real site; only the node's own configuration may")
    return site


def _open(site_file: Path) -> Site:
    """Return the site, kept for the life of the process as long as its two files stay as they are.

    A hospital that tightens its policy is obeyed from the next order on.
    """
    files = (site_file, site_file.parent / POLICY_FILE)
    return _opened(site_file, hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).digest())


@lru_cache(maxsize=LARGEST_PROCESS_SITES)
def _opened(site_file: Path, fingerprint: bytes) -> Site:  # noqa: ARG001  # the fingerprint is part of the key only
    return Site.open(site_file)


def _note(error: Exception) -> None:
    """Tell the operator of this process, and nobody else, what a refusal hides."""
    log.error("order refused", kind=type(error).__name__, reason=reason_of(error))
