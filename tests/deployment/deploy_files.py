"""The files under deploy/, and whether the commands that they name exist."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from common.cli import COMMANDS, CommandGroup

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DIGEST = "sha256:" + "0123456789abcdef" * 4
# Words after which a command line of ours ends within a text.
_END = re.compile(r"[|;&)#]|\s--?\s|\.\s|:$")
_COMMAND = re.compile(r"(?<![^\s`\"'(/])(?:(?<!/)|(?<=bin/))consilium[ \t]+([a-z][^\n`]*)")


def needs(program: str, package: str) -> pytest.MarkDecorator:
    """Skip where a program of the system is missing; CI installs it, see .ci/run."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"no {program}: apt-get install {package}")


def check_command(words: list[str]) -> None:
    """Let the installed `consilium` read a command line without running it. Raises click.ClickException."""
    group: click.Command = CommandGroup(entry_points(group=COMMANDS))
    path, rest = "consilium", list(words)
    while isinstance(group, CommandGroup):
        context = click.Context(group, info_name=path)
        name, command, rest = group.resolve_command(context, rest)
        assert name is not None
        assert command is not None
        path, group = f"{path} {name}", command
        if not rest:
            return  # a command is named, as in "`consilium federation serve` does that", not written out
    group.make_context(path, rest)


def commands_in(text: str) -> Iterator[list[str]]:
    """Every `consilium ...` of a text as words; lines that end in a backslash go on."""
    joined = re.sub(r"\\\n[\s#]*", " ", re.sub(r"\{\{.*?\}\}", "1", text))
    for found in _COMMAND.finditer(joined):
        line = _END.split(found[1], maxsplit=1)[0]
        yield shlex.split(line.strip().rstrip(".,:"))


def under_deploy(*endings: str) -> list[Path]:
    """Files of these endings, by name."""
    return sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.name.endswith(endings))


def name_of(path: Path) -> str:
    """As test ids show it."""
    return path.relative_to(ROOT).as_posix()
