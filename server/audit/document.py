"""What a report consists of, before it is a page or Markdown: chapters of blocks. Plain text in every field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Whether something is as it must be, in words; a renderer adds a sign, so colour is never the only one."""

    kind: ClassVar[str] = "mark"
    text: str
    good: bool


@dataclass(frozen=True, kw_only=True)
class Code:
    """A digest or a name, letter by letter."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """Evidence in this report: the anchor of a chapter or block, and how it is called."""

    kind: ClassVar[str] = "link"
    anchor: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Cited:
    """Evidence in a file beside the report, by its name in `ReportFacts.records`."""

    kind: ClassVar[str] = "cited"
    name: str


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A table cell of links."""

    kind: ClassVar[str] = "evidence"
    links: tuple[Link | Cited, ...]


Cell = str | Mark | Code | Evidence


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """topic: a word or two set in front, bold. quiet: a remark."""

    kind: ClassVar[str] = "paragraph"
    text: str
    topic: str = ""
    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class Heading:
    """A part of a chapter that can be linked to."""

    kind: ClassVar[str] = "heading"
    text: str
    anchor: str


@dataclass(frozen=True, kw_only=True)
class Bullets:
    """A list without order."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """head: one name a column. numbers: columns set flush right. The first cell of a row is its heading.

    layout: "claims" gives the four columns of a mapping the same widths in every table.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: frozenset[int] = frozenset()
    layout: Literal["full", "narrow", "claims"] = "full"

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.head)]
        if wrong:
            raise ValueError(f"{self.caption}: a row has {len(wrong[0])} cells, the head {len(self.head)}")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """svg: draws one trusted element, made here. text: the same in words, for renderings without pictures."""

    kind: ClassVar[str] = "drawing"
    svg: Callable[[], str]
    caption: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Columns of scans: (title, what one case is called, data URIs). swatches: (colour, label)."""

    kind: ClassVar[str] = "pictures"
    note: str
    columns: tuple[tuple[str, str, tuple[str, ...]], ...]
    swatches: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Blanks:
    """To be filled in by hand on paper: (what, lines left free)."""

    kind: ClassVar[str] = "blanks"
    fields: tuple[tuple[str, int], ...]


Block = Paragraph | Heading | Bullets | Table | Drawing | Pictures | Blanks


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One of the report's numbered points."""

    number: int
    anchor: str
    title: str
    blocks: tuple[Block, ...]
