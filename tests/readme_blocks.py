"""The parts of README and docs that the program itself can say: help, exit codes, study keys, example files.

`python -m tests.readme_blocks` rewrites them. A block lies between `<!-- generated: NAME -->` and
`<!-- end generated -->`. The last column of a table is written by people: it is kept, row by row, and is
empty for a new row until somebody explains it.

    help [COMMAND]      what `consilium [COMMAND] --help` prints
    exit codes          codes and names; when is written by people
    study keys          every key with its values and default; the meaning is written by people
    file PATH           a file of this repository, whole
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from common.cli import INTERRUPTED, PIPE_CLOSED, run
from common.errors import ExitCode
from common.settings.study import Study

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"(<!-- generated: (?P<name>[^>]+) -->\n)(?P<body>.*?)(<!-- end generated -->)", re.DOTALL)
SHELL_CODES = {INTERRUPTED: "interrupted", PIPE_CLOSED: "pipe closed"}


def renewed(page: str) -> str:
    """The page with every generated block as the program says it now."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found['name'], found['body'])}{found[4]}", page)


def blocks(page: str) -> dict[str, str]:
    """Generated blocks of a page by name."""
    return {found["name"]: found["body"] for found in BLOCK.finditer(page)}


def block(name: str, old: str) -> str:
    """One block's new text. old: its present text, for what people wrote."""
    match name.split():
        case ["help", *command]:
            return fenced("text", f"$ {' '.join(['consilium', *command, '--help'])}\n{help_text(*command)}")
        case ["exit", "codes"]:
            codes = {str(int(code)): code.name.lower() for code in ExitCode}
            codes |= {str(code): words for code, words in SHELL_CODES.items()}
            return table(("code", "name", "when"), [(code, words) for code, words in codes.items()], old)
        case ["study", "keys"]:
            return table(("key", "value", "default", "meaning"), list(study_keys(Study)), old)
        case ["file", path]:
            return fenced(Path(path).suffix.removeprefix("."), (ROOT / path).read_text(encoding="utf-8"))
        case _:
            raise ValueError(f"no generated block is named {name!r}")


def help_text(*command: str) -> str:
    """What `--help` prints, without colour and as wide as on a terminal of 100 columns."""
    printed = io.StringIO()
    with patch.dict(os.environ, COLUMNS="100", NO_COLOR="1"), contextlib.redirect_stdout(printed):
        code = run([*command, "--help"])
    if code != ExitCode.DONE:
        raise ValueError(f"`consilium {' '.join(command)} --help` ended with {code}")
    return printed.getvalue()


def fenced(language: str, text: str) -> str:
    """A code block."""
    return f"```{language}\n{text.rstrip()}\n```\n"


# --- tables -----------------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], old: str) -> str:
    """A table whose last column is taken from the row of `old` that begins with the same cell."""
    written = {cells[0]: cells[-1] for cells in table_rows(old) if len(cells) == len(head)}
    lines = [head, ("---",) * len(head), *((*row, written.get(row[0], "")) for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def table_rows(text: str) -> list[tuple[str, ...]]:
    """Cells of a table's rows, below its head."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


# --- keys of a study --------------------------------------------------------------------------------------------------


def study_keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, values it takes, and default of every key of a settings model, sections opened."""
    properties = model.model_json_schema()
    for name, field in model.model_fields.items():
        sections = [t for t in get_args(field.annotation) or (field.annotation,) if is_section(t)]
        schema = properties["properties"][name]
        if sections:
            if field.default is None:  # a section that may be left out
                yield f"`{prefix}{name}`", f"the keys below, or {values({'type': 'null'}, {})}", "`None`"
            yield from study_keys(sections[0], f"{prefix}{name}.")
            continue
        usual = field.default
        shown = f"[{', '.join(map(str, usual))}]" if isinstance(usual, tuple) else str(usual)
        default = "required" if usual is PydanticUndefined else f"`{shown}`"
        yield f"`{prefix}{name}`", values(schema, properties.get("$defs", {})), default


def is_section(annotation: Any) -> bool:
    """Whether a key of this type has keys of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:  # noqa: C901  # one case a kind
    """What a JSON schema allows, in a few words."""
    match schema:
        case {"$ref": reference}:
            words = values(definitions[reference.rpartition("/")[2]], definitions)
        case {"anyOf": options}:
            words = " or ".join(values(option, definitions) for option in options)
        case {"const": only}:
            words = f"`{only}`"
        case {"enum": names}:
            words = ", ".join(f"`{name}`" for name in names)
        case {"type": "array", "prefixItems": items}:
            words = f"{len(items)} of: {values(items[0], definitions)}"
        case {"items": item}:
            words = f"list of: {values(item, definitions)}"
        case {"type": "object"}:
            words = "whole number: name"
        case {"type": "null" | "boolean" as kind}:
            words = "`null`" if kind == "null" else "`true` or `false`"
        case {"type": "string"}:
            words = text_values(schema)
        case {"type": "number" | "integer" as kind}:
            words = number_values(schema, "whole number" if kind == "integer" else "number")
        case _:
            raise ValueError(f"no words for {schema}")
    return words


def text_values(schema: dict[str, Any]) -> str:
    """The rule for a text."""
    if "pattern" in schema:
        return f"text like `{schema['pattern']}`"
    return f"text of {schema['minLength']} characters or more" if "minLength" in schema else "text"


def number_values(schema: dict[str, Any], kind: str) -> str:
    """The range of a number."""
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    steps = [f"multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    rules = ", ".join([*bounds, *steps])
    return f"{kind} {rules}" if rules else kind


def main() -> None:
    """Rewrite every block of every page."""
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = renewed(page)
        if new != page:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
