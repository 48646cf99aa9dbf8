"""The whole report as Markdown: the same chapters as the page, in words and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import assert_never

from server.audit.document import (
    Blanks,
    Block,
    Bullets,
    Cell,
    Chapter,
    Cited,
    Code,
    Drawing,
    Evidence,
    Heading,
    Link,
    Mark,
    Paragraph,
    Pictures,
    Table,
)

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#])")


def chapter_lines(chapter: Chapter) -> Iterator[str]:
    """One chapter; its anchor is kept, so that links within the text work wherever HTML anchors do."""
    yield f'<a id="{chapter.anchor}"></a>'
    yield ""
    yield f"## {chapter.number}. {_plain(chapter.title)}"
    yield ""
    for block in chapter.blocks:
        yield from _block_lines(block)
        yield ""


def table_lines(table: Table) -> list[str]:
    """Header, rule and rows, columns padded so that it also reads well unrendered."""
    rows = [[_plain(name) for name in table.head], *([_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(table.head))]
    text = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]]


def _block_lines(block: Block) -> Iterator[str]:
    match block:
        case Paragraph():
            yield (f"**{_plain(block.topic)}:** " if block.topic else "") + _plain(block.text)
        case Heading():
            yield from (f'<a id="{block.anchor}"></a>', "", f"### {_plain(block.text)}")
        case Bullets():
            yield from (f"- {_plain(item)}" for item in block.items)
        case Table():
            yield from (f"*{_plain(block.caption)}*", "", *table_lines(block))
        case Drawing():
            yield f"*Figure, drawn in report.html.* {_plain(block.text)} {_plain(block.caption)}"
        case Pictures():
            shown = "; ".join(f"{title} ({len(cases)})" for title, _, cases in block.columns)
            yield f"*Shown in report.html:* {_plain(shown)}."
        case Blanks():
            for what, lines in block.fields:
                yield from (f"{_plain(what)}:", "", *["\\_" * 60, ""] * lines)
        case _:
            assert_never(block)


def _cell(cell: Cell) -> str:
    match cell:
        case str():
            return _plain(cell)
        case Mark():
            return f"{'✓' if cell.good else '✕'} {_plain(cell.text)}"
        case Code():
            return f"`{cell.text.replace('`', '')}`"
        case Evidence():
            return ", ".join(_link(link) for link in cell.links)
        case _:
            assert_never(cell)


def _link(link: Link | Cited) -> str:
    return f"[{_plain(link.text)}](#{link.anchor})" if isinstance(link, Link) else f"`{link.name}`"


def _plain(text: str) -> str:
    """Text that no Markdown reader takes for markup, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
