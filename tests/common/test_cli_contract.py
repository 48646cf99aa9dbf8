"""The command line as users and scripts see it: exit codes, texts, what `--help` costs."""

import json
import logging
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points, version

import pytest

from common.cli import COMMANDS, run
from common.telemetry.quiet import TALKATIVE

COMMAND_MODULE = '''
"""Sub-commands that end in every way a command can end."""
import errno, os, time
from pathlib import Path
from typing import Annotated
import typer
from common.errors import BudgetExhausted, IntegrityError, SettingsError, Unreachable, ExitCode

def good(name: str, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Greet somebody by name. A second sentence is for the long help."""
    typer.echo(f"hello {name}")

def ends(how: str, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """End in some way."""
    match how:
        case "refused":
            typer.echo("the verdict is printed")
            raise typer.Exit(ExitCode.REFUSED)
        case "budget":
            raise BudgetExhausted("epsilon would be 9.00, above the cap 8.00; nothing was trained.")
        case "settings":
            raise SettingsError("demo.yaml: unknown key 'a'\\ndemo.yaml: unknown key 'b'")
        case "unreachable":
            raise Unreachable("site-2 did not answer within 60 s")
        case "damaged":
            raise IntegrityError("the checkpoint of round 3 is damaged")
        case "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "run/checkpoint/round-0003.safetensors")
        case "wrapped disk":
            try:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as cause:
                raise RuntimeError("cannot save") from cause
        case "rust disk":
            raise RuntimeError("I/O error: No space left on device (os error 28)")
        case "forbidden":
            Path("/proc/forbidden").write_text("x")
        case "memory":
            raise MemoryError
        case "bug":
            raise KeyError("sub-017")
        case "interrupt":
            raise KeyboardInterrupt
        case "logs":
            import logging, structlog, warnings
            structlog.get_logger().error("internal detail")
            logging.getLogger("flwr").error("internal detail")
            warnings.warn("internal detail", UserWarning)
        case "sleep":
            typer.echo("ready")
            time.sleep(60)
'''


@pytest.fixture
def commands(tmp_path, monkeypatch):
    (tmp_path / "cli_contract_commands.py").write_text(COMMAND_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("os.environ", dict(os.environ))
    yield [
        EntryPoint(name=name, value=f"cli_contract_commands:{function}", group=COMMANDS)
        for name, function in (("good", "good"), ("ends", "ends"), ("gone", "missing"))
    ]
    sys.modules.pop("cli_contract_commands", None)
    logging.captureWarnings(False)
    for name in TALKATIVE:
        logging.getLogger(name).filters.clear()


ENDINGS = [
    ("refused", 1, ""),
    ("budget", 1, "error: epsilon would be 9.00, above the cap 8.00; nothing was trained.\n"),
    (
        "settings",
        2,
        "error: 2 problems; nothing was started\n  demo.yaml: unknown key 'a'\n  demo.yaml: unknown key 'b'\n",
    ),
    ("unreachable", 3, "error: site-2 did not answer within 60 s\n"),
    ("damaged", 4, "error: the checkpoint of round 3 is damaged\n"),
    ("disk", 4, "error: the disk is full at run/checkpoint/round-0003.safetensors; what is on disk stays whole."),
    ("wrapped disk", 4, "error: the disk is full; "),
    ("rust disk", 4, "error: the disk is full; "),
    ("forbidden", 4, "error: /proc/forbidden: "),
    ("memory", 4, "error: there is not enough memory; "),
    ("bug", 4, "error: internal error (KeyError); nothing was released"),
    ("interrupt", 130, "stopped; what is on disk stays. Run the same command again to resume.\n"),
]


@pytest.mark.parametrize(("how", "code", "text"), ENDINGS)
def test_every_ending_is_one_text_on_standard_error_and_its_code(commands, capsys, how, code, text):
    assert run(["ends", how], commands) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(text)
    assert "Traceback" not in printed.err
    assert "sub-017" not in printed.err


@pytest.mark.parametrize(("how", "code", "text"), ENDINGS[1:])
def test_with_json_a_failure_is_one_object_on_standard_output(commands, capsys, how, code, text):
    assert run(["ends", how, "--json"], commands) == code
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["exit_code"] == code
    assert answer["error"].startswith(text.removeprefix("error: ").rstrip("\n"))
    assert printed.err == ""


def test_a_bug_leaves_its_traceback_in_a_file_that_is_named(commands, capsys):
    run(["ends", "bug"], commands)
    path = capsys.readouterr().err.split()[-1]
    with open(path) as file:  # noqa: PTH123
        assert "KeyError" in file.read()
    os.unlink(path)  # noqa: PTH108


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["goood", "x"], "error: there is no command 'goood'; did you mean 'good'? See `consilium --help`.\n"),
        (["zzz"], "error: there is no command 'zzz'. See `consilium --help`.\n"),
        (["good"], "error: Missing argument 'NAME'. See `consilium good --help`.\n"),
        (
            ["good", "x", "--jsn"],
            "error: No such option '--jsn'. Did you mean '--json'? See `consilium good --help`.\n",
        ),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_where_help_is(commands, capsys, arguments, text):
    assert run(arguments, commands) == 2
    assert capsys.readouterr().err == text


def test_a_command_prints_its_result_on_standard_output(commands, capsys):
    assert run(["good", "world"], commands) == 0
    assert capsys.readouterr() == ("hello world\n", "")


def test_help_lists_every_command_with_its_first_sentence(commands, capsys):
    assert run(["--help"], commands) == 0
    shown = capsys.readouterr().out
    assert "good  Greet somebody by name\n" in shown
    assert "gone  (not installed)\n" in shown
    assert "cli_contract_commands" not in sys.modules


@pytest.fixture
def both(commands):
    """`good`, and `good ends` beside it."""
    return [*commands, EntryPoint(name="good ends", value="cli_contract_commands:ends", group=COMMANDS)]


def test_a_word_that_names_a_further_command_wins_over_the_command_itself(both, capsys):
    assert run(["good", "ends", "refused"], both) == 1
    assert capsys.readouterr().out == "the verdict is printed\n"


@pytest.mark.parametrize("word", ["world", "./ends", "end"])
def test_any_other_word_is_an_argument_of_the_command_itself(both, capsys, word):
    assert run(["good", word], both) == 0
    assert capsys.readouterr().out == f"hello {word}\n"


def test_help_of_a_command_names_its_further_commands_and_that_of_all_lists_both(both, capsys):
    assert run(["good", "--help"], both) == 0
    shown = capsys.readouterr().out
    assert "Greet somebody by name." in shown
    assert "  Further commands:\n    good ends  End in some way\n" in shown
    assert run(["--help"], both) == 0
    shown = capsys.readouterr().out
    assert "  good       Greet somebody by name\n  good ends  End in some way\n" in shown


def test_a_further_command_explains_itself_and_names_itself_in_errors(both, capsys):
    assert run(["good", "ends"], both) == 2
    assert capsys.readouterr().err == "error: Missing argument 'HOW'. See `consilium good ends --help`.\n"


def test_no_arguments_show_help_and_are_wrong_usage(commands, capsys):
    assert run([], commands) == 2
    assert "Commands:" in capsys.readouterr().err


def test_version_is_that_of_the_installed_package(commands, capsys):
    assert run(["--version"], commands) == 0
    assert capsys.readouterr().out == f"consilium {version('consilium')}\n"


def test_telemetry_is_off_before_a_command_is_imported(commands):
    run(["good", "x"], commands)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_help_of_the_real_command_imports_nothing_heavy():
    program = (
        "import sys; from common.cli import run; code = run(['--help']);"
        "heavy = {'torch', 'flwr', 'numpy', 'pydantic', 'rich', 'sqlalchemy', 'server.cli', 'client.cli'};"
        "print(sorted(heavy & set(sys.modules)));"
        "sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_every_declared_command_is_installed_and_explains_itself(capsys):
    declared = {point.name for point in entry_points(group=COMMANDS)}
    assert declared == {
        "simulate",
        "audit",
        "audit synthetic",
        "audit verify",
        "release",
        "release nnunet",
        "release revoke",
        "release sign",
        "report",
        "select",
        "verify",
        "sample",
        "phantom",
        "doctor",
        "health",
        "security-log",
        *(
            f"federation {word}"
            for word in (
                "init", "enrol", "revoke", "renew", "sites", "serve", "start", "status", "stop", "resume",
            )
        ),
        *(
            f"site {word}"
            for word in (
                "init", "join", "doctor", "dummy", "check", "approve", "revoke-approval", "serve", "pause", "unpause",
                "ledger", "near-copies",
            )
        ),
    }  # fmt: skip
    assert run(["--help"]) == 0
    assert "(not installed)" not in capsys.readouterr().out


def _started(commands_folder, *arguments):
    program = (
        "import sys; from importlib.metadata import EntryPoint; from common.cli import run;"
        "point = EntryPoint(name='ends', value='cli_contract_commands:ends', group='x');"
        "sys.exit(run(sys.argv[1:], [point]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(commands_folder), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_control_c_ends_with_130_and_one_line(commands, tmp_path):
    with _started(tmp_path, "ends", "sleep") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert err == "stopped; what is on disk stays. Run the same command again to resume.\n"


def test_libraries_do_not_talk_on_the_terminal(commands, tmp_path):
    with _started(tmp_path, "ends", "logs") as process:
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0


def test_a_reader_that_goes_away_is_no_error(commands, tmp_path):
    with _started(tmp_path, "ends", "refused") as process:
        process.stdout.close()
        assert process.wait(timeout=20) == 141
        assert process.stderr.read() == ""
