"""A SuperNode in which something failed ends, so that the site starts it again. The network point of
`tests/deployment/test_kill_matrix.py` shows it with the real one; here another program stands in its place."""

import subprocess
import sys

import pytest

from common.errors import ExitCode

# What serves the runner is a thread that nobody ends; `does` is what Flower's own function does beside it.
PROGRAM = """
import sys, threading, time, flwr.common.logger, flwr.supernode.cli as cli, client.supernode
def supernode():
    threading.Thread(target=lambda: time.sleep(600)).start()
    {does}
cli.flower_supernode = supernode
client.supernode.main()
"""


@pytest.mark.parametrize(
    ("does", "code", "told"),
    [
        ("raise ConnectionError('http://name:word@proxy')", ExitCode.INTERNAL, "the SuperNode failed: ConnectionError"),
        (
            "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(600)",
            ExitCode.INTERNAL,
            "the SuperNode failed: ZeroDivisionError",
        ),
        (
            "flwr.common.logger.log(20, client.supernode.DROPPED, 1, 2); time.sleep(600)",
            ExitCode.INTERNAL,
            "the SuperNode dropped an order of a run that has ended, and begins anew",
        ),
        ("return", ExitCode.INTERNAL, ""),
        ("sys.exit(1)", 1, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('words')", 1, ""),
    ],
    ids=[
        "main thread",
        "another thread",
        "drops an order",
        "returns",
        "Flower's exit",
        "told to end",
        "exit with words",
    ],
)
def test_the_process_ends_with_whatever_failed_first(does, code, told):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(does=does)], capture_output=True, text=True, check=False, timeout=120
    )
    ours = "\n".join(line for line in ended.stderr.splitlines() if "INFO" not in line)
    assert (ended.returncode, ended.stdout, ours) == (code, "", told)
