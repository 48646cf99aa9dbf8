"""The command `consilium`: finds sub-commands, runs the one that is called, and is the one place where errors end.

A sub-command is a function with typer annotations, named in the entry points `consilium.commands` of
pyproject.toml. The first sentence of its docstring is its help line; it is read from the source text, so that
`--help` imports no sub-command. Conventions every sub-command keeps:

- `--json` prints one JSON object on standard output and nothing else; progress goes to standard error.
- A name of two words, `site ledger`, is a sub-command of a group; what the group is for is the first sentence of the
  docstring of the module that holds its first command.
- A group may be a command as well: of `audit` and `audit verify` the second runs when the next word is `verify`, the
  first for anything else. A file called `verify` is then given as `./verify`.
- It prints results itself and raises an error of `common.errors` for everything else; a result that is a
  refusal ends with `raise typer.Exit(ExitCode.REFUSED)` once it is printed.
- Torch and other heavy libraries are imported inside the function.
"""

from __future__ import annotations

import ast
import difflib
import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import SourceLoader
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import find_spec

import click
import typer

from common.errors import ConsiliumError, ExitCode, SettingsError
from common.telemetry.quiet import drop_logs, quieten_libraries

COMMANDS = "consilium.commands"
INTERRUPTED = 130  # what shells report for Ctrl-C
PIPE_CLOSED = 141  # what shells report when the reader of a pipe has gone

# Read by libraries while they are imported, so it must stand before that.
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "GRPC_VERBOSITY": "ERROR",
    "MPLBACKEND": "Agg",
}


def main() -> None:
    """Entry point of the `consilium` script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], commands: Iterable[EntryPoint] | None = None) -> int:
    """Run one command line and return its exit code. Every error ends here, as a text and a code.

    commands: sub-commands to offer; those that are installed when left out.
    """
    os.environ.update(ENVIRONMENT)
    quieten_libraries()
    show_version = click.Option(
        ["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_show_version,
        help="Show the version and exit.",
    )
    group = CommandGroup(entry_points(group=COMMANDS) if commands is None else commands, params=[show_version])
    try:
        with group.make_context("consilium", list(arguments)) as context:
            group.invoke(context)
            sys.stdout.flush()  # here, where a closed pipe can still be dealt with
    except click.exceptions.Exit as ending:
        return int(ending.exit_code)
    except click.exceptions.NoArgsIsHelpError as help_text:
        help_text.show()
        return ExitCode.USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return PIPE_CLOSED
    except (KeyboardInterrupt, click.Abort):
        text = "stopped; what is on disk stays. Run the same command again to resume."
        return _tell(text, INTERRUPTED, as_json="--json" in arguments)
    except Exception as failure:  # noqa: BLE001  the one boundary of the process
        text, code = _ending(failure)
        return _tell(f"error: {text}", code, as_json="--json" in arguments)
    return ExitCode.DONE


class CommandGroup(click.Group):
    """Sub-commands and groups of them by name; a module is imported only when its command is called."""

    def __init__(
        self,
        commands: Iterable[EntryPoint],
        *,
        name: str = "consilium",
        text: str = "Federated, differentially private generation of synthetic 3-D medical scans, "
        "audited before release.",
        params: Sequence[click.Parameter] = (),
    ) -> None:
        super().__init__(name=name, help=text, params=list(params))
        self._found: dict[str, EntryPoint] = {}
        self._groups: dict[str, CommandGroup] = {}
        groups: dict[str, list[EntryPoint]] = {}
        for point in commands:
            first, _, rest = point.name.partition(" ")
            if rest:
                groups.setdefault(first, []).append(EntryPoint(rest, point.value, point.group))
            else:
                self._found[first] = point
        for first, points in groups.items():
            self._groups[first] = CommandGroup(points, name=first, text=f"{_module_line(points[0])}.")

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Names of all sub-commands."""
        return sorted({*self._found, *self._groups})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and build one sub-command; None when there is none of that name."""
        found, group = self._found.get(cmd_name), self._groups.get(cmd_name)
        if found is None:
            return group
        drop_logs()
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        # click wraps an epilog's paragraphs, but not one that begins with \b.
        further = [f"  {name}  {text}" for name, text in group.lines(cmd_name)] if group else []
        epilog = "\n".join(["\b", "Further commands:", *further]) if further else None
        app.command(cmd_name, epilog=epilog)(found.load())
        command = typer.main.get_command(app)
        command.context_class = _PlainContext
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click. A word that names a sub-command wins over the group's own command; a misspelt one is told."""
        name, rest = args[0], args[1:]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            ctx.fail(f"there is no command {name!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
        group = self._groups.get(name)
        if group and rest and rest[0] in group.list_commands(ctx):
            return name, group, rest
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the sub-commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([row for name in self.list_commands(ctx) for row in self._lines(name)])

    def lines(self, word: str) -> list[tuple[str, str]]:
        """Name as it is typed after `consilium`, and first sentence, of each sub-command."""
        return [(f"{word} {name}", help_line(point)) for name, point in sorted(self._found.items())]

    def _lines(self, name: str) -> list[tuple[str, str]]:
        """Its line; of a command with further ones, a line for each of these as well."""
        found, group = self._found.get(name), self._groups.get(name)
        if found is None:
            return [(name, (group.help or "").rstrip("."))] if group else []
        return [(name, help_line(found)), *(group.lines(name) if group else [])]


class _PlainFormatter(click.HelpFormatter):
    """Undoes typer's escaping of brackets, which it does for rich even when help is plain text."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        plain = [(term, text.replace("\\[", "[")) for term, text in rows]
        super().write_dl(plain, col_max=col_max, col_spacing=col_spacing)


class _PlainContext(click.Context):
    formatter_class = _PlainFormatter


def help_line(point: EntryPoint) -> str:
    """First sentence of the docstring of a sub-command's function, from its source text."""
    for node in _source(point).body:
        if isinstance(node, ast.FunctionDef) and node.name == point.attr:
            return _first_sentence(node)
    return "(not installed)"


def _module_line(point: EntryPoint) -> str:
    """First sentence of the docstring of the module that holds a sub-command."""
    return _first_sentence(_source(point)) or "(not installed)"


def _source(point: EntryPoint) -> ast.Module:
    spec = find_spec(point.module)
    source = spec.loader.get_source(point.module) if spec and isinstance(spec.loader, SourceLoader) else None
    return ast.parse(source or "")


def _first_sentence(node: ast.FunctionDef | ast.Module) -> str:
    first_line = (ast.get_docstring(node) or "").partition("\n")[0]
    return first_line.partition(". ")[0].rstrip(".")


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"consilium {version('consilium')}")
        context.exit()


# --- how a failed command ends ----------------------------------------------------------------------------------------


def _ending(failure: Exception) -> tuple[str, int]:
    """What to tell the user about a failure, and the exit code."""
    match failure:
        case SettingsError() if "\n" in str(failure):
            problems = str(failure).splitlines()
            return f"{len(problems)} problems; nothing was started\n  " + "\n  ".join(problems), failure.exit_code
        case ConsiliumError():
            return str(failure), failure.exit_code
        case click.ClickException():
            command = failure.ctx.command_path if isinstance(failure, click.UsageError) and failure.ctx else "consilium"
            said = failure.format_message()
            return f"{said}{'' if said.endswith(('.', '?')) else '.'} See `{command} --help`.", ExitCode.USAGE
        case _:
            return _unforeseen(failure), ExitCode.INTERNAL


def _unforeseen(failure: Exception) -> str:
    resume = "what is on disk stays whole. Correct that and run the same command again to resume."
    if any(_is_disk_full(cause) for cause in _causes(failure)):
        name = getattr(failure, "filename", None)
        return f"the disk is full{f' at {name}' if name else ''}; {resume}"
    if isinstance(failure, MemoryError):
        return f"there is not enough memory; {resume}"
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.filename or 'the operating system'}: {failure.strerror}; {resume}"
    return (
        f"internal error ({type(failure).__name__}); nothing was released and what is on disk stays. "
        f"Please report it with {_record(failure)}"
    )


def _is_disk_full(cause: BaseException) -> bool:
    # Libraries in Rust and C++ give the text of the operating system instead of its number.
    return getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(cause)


def _causes(failure: BaseException | None) -> Iterator[BaseException]:
    while failure is not None:
        yield failure
        failure = failure.__cause__ or failure.__context__


def _record(failure: Exception) -> str:
    """Where the details of an unexpected failure are: the run's log, or a file of their own."""
    for note in getattr(failure, "__notes__", ()):
        if note.startswith("log: "):
            return str(note.removeprefix("log: "))
    with tempfile.NamedTemporaryFile("w", prefix="consilium-error-", suffix=".txt", delete=False) as file:
        file.writelines(traceback.format_exception(failure))
    return file.name


def _tell(text: str, code: int, *, as_json: bool) -> int:
    if as_json:
        click.echo(json.dumps({"error": text.removeprefix("error: "), "exit_code": int(code)}))
    else:
        click.echo(text, err=True)
    return int(code)


if __name__ == "__main__":
    main()
