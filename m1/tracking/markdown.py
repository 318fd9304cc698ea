"""Markdown as MLflow's pages show it, in descriptions and in artifacts alike."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: What Markdown, a table, or HTML would take for itself.
_SPECIAL = {character: f"&#{ord(character)};" for character in "&<>|*[]`~\\"}
_EDGE_UNDERSCORE = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
#: Between columns: descriptions show tables without any distance between them.
_GAP = "&emsp;"


@dataclass(frozen=True)
class Picture:
    """A small image to show, and the page with the whole figure."""

    title: str
    source: str
    page: str


def plain(text: str) -> str:
    """Any text as it is, in one line."""
    escaped = "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))
    return _EDGE_UNDERSCORE.sub("&#95;", escaped)


def code(text: str) -> str:
    """A path, hash or name in the typeface of code."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', '/')}`"


def link(text: str, url: str | None) -> str:
    """A link, or the text alone where there is no page."""
    return f"[{plain(text)}]({url})" if url else plain(text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; cells are Markdown already."""
    return [
        _line(header),
        _line([":---"] * len(header), gap=""),
        *(_line(row) for row in rows),
    ]


def _line(cells: Sequence[str], gap: str = _GAP) -> str:
    *first, last = cells
    return "| " + " | ".join([*(f"{cell}{gap}" if cell else "" for cell in first), last]) + " |"


def bullets(texts: Iterable[str]) -> list[str]:
    return [f"- {text}" for text in texts]


def pictures(shown: Sequence[Picture]) -> list[str]:
    """Images one below the other, each below its title and a link to the figure in full size."""
    shown_as = [f"[![{plain(each.title)}]({each.source})]({each.page})" for each in shown]
    return [line for each, image in zip(shown, shown_as) for line in (f"**{plain(each.title)}**", image)]


def page(*blocks: Sequence[str]) -> str:
    """Blocks of lines with an empty line between them; empty blocks are left out."""
    return "\n\n".join("\n".join(block) for block in blocks if block)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def change(before: float | None, after: float | None) -> str:
    """`before → after`, or the one there is."""
    if before is None or after is None:
        return number(after if before is None else before)
    return f"{number(before)} → {number(after)}"


def duration(seconds: float) -> str:
    """Time for people: "4.2 s", "3 min 5 s", "2 h 7 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
