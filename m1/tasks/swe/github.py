"""Issues and merged pull requests as the gh command exports them, and which closes which.

A pull request closes an issue where GitHub lists it so, or where its title or text says `fixes #7` as GitHub reads it:
not in code, not in an HTML comment, and not of another repository.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from m1.rows import Reject, read_objects, require_any, shown

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

PULL_FIELDS = ("number", "title", "body", "mergeCommit", "closingIssuesReferences")
ISSUE_FIELDS = ("number", "title", "body")
T = TypeVar("T")
#: GitHub takes no longer text.
_LONGEST = 65_536
_WORD = r"(?:close[sd]?|fix(?:e[sd])?|resolve[sd]?)"
_SLUG = r"[A-Za-z0-9][\w.-]{0,99}/[\w.-]{1,100}"
_CLOSES = re.compile(
    rf"(?<![\w/-]){_WORD}(?:\s{{0,9}}:\s{{0,9}}|\s{{1,9}})(?:"
    rf"https?://(?:www\.)?github\.com/(?P<url>{_SLUG})/(?:issues|pull)/(?P<of_url>\d{{1,9}})"
    rf"|(?P<slug>{_SLUG})?#(?P<of_slug>\d{{1,9}})"
    rf"|GH-(?P<short>\d{{1,9}})"
    r")(?!\w)",
    re.IGNORECASE,
)
_ISSUE_URL = re.compile(rf"https?://(?:www\.)?github\.com/({_SLUG})/", re.IGNORECASE)
_COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class PullRequest:
    """A merged pull request with the issues that it closes.

    Attributes:
        commit: its merge commit.
        issues: (number, title, text) of each.
    """

    number: int
    commit: str
    issues: tuple[tuple[int, str, str], ...]


@dataclass(frozen=True)
class Reference:
    """An issue that is said to be closed; `repository` is owner/name in lower case, or None for the own one."""

    repository: str | None
    number: int

    def __str__(self) -> str:
        return f"{self.repository or ''}#{self.number}"


class _Bad(ValueError):
    """Why a row cannot be used."""


def read_github(
    issues_file: Path,
    pulls_file: Path,
    *,
    ours: Iterable[str] = (),
    reject: Callable[[str, str], None] = lambda name, reason: None,
) -> list[PullRequest]:
    """Pull requests that were merged and close an issue of the export, in the order of their numbers.

    The files are the output of `gh issue list --state all --json number,title,body` and
    `gh pr list --state merged --json number,title,body,mergeCommit,closingIssuesReferences`.

    Args:
        ours: owner/name of the repository, and of those it was forked from. References that name any other are
            not followed.
        reject: of rows of both files that cannot be used.

    Raises:
        UsageError: a file cannot be read, or has not one row of such an export.
    """
    own = frozenset(name.lower() for name in ours)
    issues = _each(issues_file, "issue", ISSUE_FIELDS, _issue, reject)
    found = _each(pulls_file, "pull", PULL_FIELDS[:4], lambda row: _pull(row, issues, own), reject)
    return [found[number] for number in sorted(found)]


def _each(
    file: Path,
    kind: str,
    fields: Sequence[str],
    read: Callable[[dict[str, Any]], T],
    reject: Callable[[str, str], None],
) -> dict[int, T]:
    """What `read` makes of every row that has the fields, by number; the others are rejected.

    Raises:
        UsageError: the file cannot be read, or no row of it has the fields.
    """
    rows = read_objects(file)
    rejected, found, complete = list(rows.rejected), {}, 0
    for place, row in rows.good:
        name = place
        try:
            if missing := [field for field in fields if field not in row]:
                raise _Bad(f"it has no {', '.join(missing)}; export with --json {','.join(fields)}")
            complete += 1
            number = _number(row["number"])
            name = f"{kind} {number}"
            if number in found:
                raise _Bad("it is given twice")
            found[number] = read(row)
        except _Bad as error:
            rejected.append(Reject(name, str(error)))
    for each in rejected:
        reject(each.id, each.reason)
    require_any(file, complete, rejected)
    return found


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 10**9:
        raise _Bad(f"{shown(value)} is not the number of an issue")
    return value


def _text(row: dict[str, Any], field: str) -> str:
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise _Bad(f"its {field} is not text but {shown(value)}")
    return value or ""


def _issue(row: dict[str, Any]) -> tuple[int, str, str]:
    title, body = _text(row, "title"), _text(row, "body")
    if not f"{title}{body}".strip():
        raise _Bad("it has neither title nor text")
    return row["number"], title, body


def _pull(row: dict[str, Any], issues: dict[int, tuple[int, str, str]], own: frozenset[str]) -> PullRequest:
    merge = row["mergeCommit"]
    if merge is None:
        raise _Bad("it was not merged")
    commit = merge.get("oid") if isinstance(merge, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise _Bad(f"its mergeCommit {shown(merge)} has no hash of a commit")
    said = [
        *_listed(row.get("closingIssuesReferences")),
        *closed_in(_text(row, "title")),
        *closed_in(_text(row, "body")),
    ]
    foreign = [reference for reference in said if reference.repository not in (None, *own)]
    numbers = dict.fromkeys(reference.number for reference in said if reference not in foreign)
    closed = tuple(issues[number] for number in numbers if number in issues)
    if not closed and foreign:
        unknown = "" if own else f"; if that is this repository, give it `github: {foreign[0].repository}` in the spec"
        raise _Bad(f"it closes {foreign[0]}, an issue of another repository{unknown}")
    if not closed:
        raise _Bad("it closes no issue of the export")
    return PullRequest(row["number"], commit, closed)


def _listed(references: Any) -> Iterator[Reference]:
    """GitHub's own account of what a pull request closes."""
    if references is None:
        return
    if not isinstance(references, list):
        raise _Bad(f"its closingIssuesReferences is not a list but {shown(references)}")
    for item in references:
        if not isinstance(item, dict):
            raise _Bad(f"its closingIssuesReferences hold {shown(item)}")
        yield Reference(_repository(item), _number(item.get("number")))


def _repository(item: dict[str, Any]) -> str | None:
    repository = item.get("repository")
    if isinstance(repository, dict):
        owner = repository.get("owner")
        login = owner.get("login") if isinstance(owner, dict) else None
        slug = repository.get("nameWithOwner") or f"{login}/{repository.get('name')}"
        return str(slug).lower()
    named = _ISSUE_URL.match(item["url"]) if isinstance(item.get("url"), str) else None
    return named[1].lower() if named else None


def closed_in(markdown: str) -> list[Reference]:
    """Issues that a text says it closes, in its order, each once."""
    found = []
    for text in _prose(markdown[:_LONGEST]):
        for match in _CLOSES.finditer(text):
            slug = match["url"] or match["slug"]
            number = match["of_url"] or match["of_slug"] or match["short"]
            found.append(Reference(slug.lower() if slug else None, int(number)))
    return list(dict.fromkeys(found))


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    # Emphasis and links would only cut the text into pieces, some of them at great length.
    return MarkdownIt("commonmark").disable(["emphasis", "link", "image", "entity"])


def _prose(markdown: str) -> Iterator[str]:
    """The text of every paragraph without code and HTML."""
    for block in _parser().parse(markdown):
        if block.type != "inline":
            continue
        parts, code = [], 0
        for part in block.children or ():
            if part.type == "html_inline":
                tag = re.match(r"<(/?)(?:code|pre|kbd)\b", part.content, re.IGNORECASE)
                code = max(0, code + (-1 if tag[1] else 1)) if tag else code
            elif part.type in ("text", "softbreak", "hardbreak") and not code:
                parts.append(part.content if part.type == "text" else "\n")
            if part.type in ("html_inline", "code_inline"):
                parts.append(" \x00 ")  # a word and its number on the two sides of it do not belong together
        yield "".join(parts)


def slug_of_url(url: str) -> str | None:
    """owner/name, in lower case, of a remote on GitHub; None if it is elsewhere."""
    match = re.search(rf"github\.com[:/]({_SLUG}?)(?:\.git)?/?$", url.strip(), re.IGNORECASE)
    return match[1].lower() if match else None
