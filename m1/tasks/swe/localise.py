"""Where is the fault? Two stages, file and then element, as Agentless has them; and the prompt cut to the window.

Without a model the stages rank by the words of the issue (BM25 over identifiers, plus what it names outright); with
one they ask it, and the ranking only decides what it is shown. Scores are by overlap.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from m1.tasks.swe.answers import Location, parse_locations
from m1.tasks.swe.python_source import FUNCTIONS, MODULE, Element, NotPython, elements, parse

#: Length of a text in tokens.
Count = Callable[[str], int]

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


def words(text: str) -> list[str]:
    """Identifiers in lower case, and the parts of compound ones."""
    found = []
    for word in _WORD.findall(text):
        found.append(word.lower())
        parts = [part.lower() for part in _PART.findall(word)]
        if len(parts) > 1:
            found += parts
    return found


@dataclass(frozen=True)
class Ranked:
    """A file, or an element of one, with its score."""

    path: str
    element: str
    score: float


@lru_cache(maxsize=4096)
def _bag(text: str) -> Counter[str]:
    """Words of a text with their frequencies; most files of a package are the same from task to task."""
    return Counter(words(text))


def _bm25(query: Iterable[str], documents: Sequence[Counter[str]], k: float = 1.2, b: float = 0.75) -> list[float]:
    """Okapi BM25 of every document (Robertson and Zaragoza 2009), each query word counted once."""
    lengths = [document.total() for document in documents]
    mean = sum(lengths) / max(1, len(documents)) or 1.0
    scores = [0.0] * len(documents)
    for word in sorted(set(query)):
        holding = sum(word in document for document in documents)
        if not holding:
            continue
        weight = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
        for at, document in enumerate(documents):
            frequency = document[word]
            scores[at] += weight * frequency * (k + 1) / (frequency + k * (1 - b + b * lengths[at] / mean))
    return scores


def rank_files(issue: str, tree: Mapping[str, bytes], is_code: Callable[[str], bool]) -> list[Ranked]:
    """Stage one: code files, the likeliest first; a file that the issue names, or defines what it calls, goes ahead."""
    paths = sorted(path for path in tree if is_code(path))
    texts = [tree[path].decode("utf-8", "replace") for path in paths]
    scores = _bm25(words(issue), [_bag(f"{path} {text}") for path, text in zip(paths, texts, strict=True)])
    mentioned = set(_WORD.findall(issue))
    top = max(scores, default=0.0) or 1.0
    ranked = []
    for path, text, score in zip(paths, texts, scores, strict=True):
        defined = {name.split(".")[-1] for name in _names(text) if len(name.split(".")[-1]) > 3}
        score += top * (path in issue) + 0.5 * top * bool(defined & mentioned)
        ranked.append(Ranked(path, "", score))
    return sorted(ranked, key=lambda item: (-item.score, item.path))


@lru_cache(maxsize=4096)
def _names(text: str) -> list[str]:
    try:
        return [element.name for element in elements(parse(text.encode("utf-8")))]
    except NotPython:
        return []


def rank_elements(issue: str, tree: Mapping[str, bytes], files: Sequence[str]) -> list[Ranked]:
    """Stage two: functions and methods of the given files, the likeliest first; `<module>` for the rest of a file."""
    places: list[Location] = []
    documents = []
    for path in files:
        for element, text in pieces(tree[path]):
            places.append((path, element))
            documents.append(_bag(f"{element} {text}"))
    scores = _bm25(words(issue), documents)
    mentioned = set(_WORD.findall(issue))
    top = max(scores, default=0.0) or 1.0
    ranked = []
    for (path, element), score in zip(places, scores, strict=True):
        score += top * (element.split(".")[-1] in mentioned) * (element != MODULE)
        score *= 0.5 if element == MODULE else 1.0
        ranked.append(Ranked(path, element, score))
    order = {path: at for at, path in enumerate(files)}
    return sorted(ranked, key=lambda item: (-item.score, order[item.path], item.element))


def pieces(content: bytes) -> list[tuple[str, str]]:
    """(element, text) of a file: every function and method, and `<module>` for all other lines."""
    lines = content.decode("utf-8", "replace").split("\n")
    try:
        found = [element for element in elements(parse(content)) if not element.is_class]
    except NotPython:
        return [(MODULE, "\n".join(lines))]
    inside = {line for element in found for line in range(element.first, element.last + 1)}
    rest = [line for at, line in enumerate(lines, 1) if at not in inside]
    return [(e.name, "\n".join(lines[e.first - 1 : e.last])) for e in found] + [(MODULE, "\n".join(rest))]


# --- what is shown ---


def skeleton(content: bytes) -> str:
    """Signatures and first docstring lines of a file, in order; nothing for a file that is not Python."""
    try:
        tree = parse(content)
    except NotPython:
        return ""
    lines = content.decode("utf-8").split("\n")
    shown: list[str] = []

    def visit(body: Sequence[ast.stmt], indent: str) -> None:
        for node in body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                end = max(node.lineno, node.body[0].lineno - 1)
                while end > node.lineno and not lines[end - 1].rstrip().endswith(":"):
                    end -= 1
                shown.append(indent + " ".join(line.strip() for line in lines[node.lineno - 1 : end]))
                if doc := ast.get_docstring(node):
                    shown.append(f'{indent}    """{doc.split(chr(10))[0]}"""')
                if isinstance(node, ast.ClassDef):
                    visit(node.body, indent + "    ")

    visit(tree.body, "")
    return "\n".join(shown)


def cut(tree: Mapping[str, bytes], ranked: Sequence[Ranked], window: int, count: Count) -> str:
    """The best-ranked elements in full, each under its file's name, as many as fit into `window` tokens.

    Files and elements stay in the order of their lines, left-out parts are marked with `...`, and what is shown is the
    files' own text, so that search blocks can be copied from it. An element that does not fit is passed over.
    """
    texts = {path: dict(pieces(tree[path])) for path in dict.fromkeys(item.path for item in ranked)}
    chosen: list[Ranked] = []
    used, started = 0, set()
    for item in ranked:
        heading = "" if item.path in started else f"### {item.path}\n```python\n```\n"
        size = count(f"{heading}...\n{texts[item.path][item.element]}\n...\n")
        if used + size <= window:
            used += size
            started.add(item.path)
            chosen.append(item)
    while chosen and count(_show_all(tree, chosen)) > window:
        chosen.pop()
    return _show_all(tree, chosen)


def _show_all(tree: Mapping[str, bytes], chosen: Sequence[Ranked]) -> str:
    names: dict[str, set[str]] = {}
    for item in chosen:
        names.setdefault(item.path, set()).add(item.element)
    return "\n".join(_show(path, tree[path], elements_) for path, elements_ in names.items())


def _show(path: str, content: bytes, names: Iterable[str]) -> str:
    lines = content.decode("utf-8", "replace").split("\n")
    try:
        found = [element for element in elements(parse(content)) if not element.is_class]
    except NotPython:
        return f"### {path}\n```python\n" + "\n".join(lines) + "\n```\n"
    names = set(names)
    kept = _kept_lines(found, names, len(lines))
    shown: list[str] = []
    for at, line in enumerate(lines, 1):
        if at in kept:
            shown.append(line)
        elif not shown or shown[-1] != "...":
            shown.append("...")
    return f"### {path}\n```python\n" + "\n".join(shown) + "\n```\n"


def _kept_lines(found: Sequence[Element], names: set[str], total: int) -> set[int]:
    kept = {line for e in found if e.name in names for line in range(e.first, e.last + 1)}
    if MODULE in names:
        kept |= set(range(1, total + 1)) - {line for e in found for line in range(e.first, e.last + 1)}
    return kept


# --- asking a model ---

FILE_PROMPT = """A library has a fault. Name the files that must be edited to fix it, at most {most}, the likeliest \
first, one path a line and nothing else.

{issue}
Files:
{files}
"""
ELEMENT_PROMPT = """A library has a fault. Name the functions or methods that must be edited to fix it, at most \
{most}, the likeliest first, one a line as `path: Class.method` and nothing else.

{issue}
{skeletons}
"""


def parse_files(answer: str, tree: Mapping[str, bytes]) -> list[str]:
    """Paths of the tree that an answer names, line by line, in its order, each once."""
    named = [line.strip().strip("`-* ").strip() for line in answer.split("\n")]
    return list(dict.fromkeys(path for path in named if path in tree))


def localise(
    issue: str,
    tree: Mapping[str, bytes],
    is_code: Callable[[str], bool],
    *,
    window: int,
    count: Count,
    ask: Callable[[str], str] | None = None,
    files: int = 3,
    most: int = 5,
) -> list[Ranked]:
    """Both stages. What the model (`ask`) names goes first, in its order; what it leaves out follows by rank."""
    by_words = [item.path for item in rank_files(issue, tree, is_code)]
    chosen = by_words[:files]
    if ask is not None:
        listed = _as_many_as_fit(by_words, window, lambda paths: count("\n".join(paths)))
        answer = parse_files(ask(FILE_PROMPT.format(most=files, issue=issue, files="\n".join(sorted(listed)))), tree)
        chosen = list(dict.fromkeys([path for path in answer if is_code(path)] + chosen))[:files]
    ranked = rank_elements(issue, tree, chosen)
    if ask is None:
        return ranked
    shown = {path: f"### {path}\n{skeleton(tree[path])}\n" for path in chosen}
    fitting = _as_many_as_fit(chosen, window, lambda paths: count("".join(shown[path] for path in paths)))
    prompt = ELEMENT_PROMPT.format(most=most, issue=issue, skeletons="".join(shown[path] for path in fitting))
    known = {(item.path, item.element): item for item in ranked}
    first = [known[place] for place in parse_locations(ask(prompt))[:most] if place in known]
    return first + [item for item in ranked if item not in first]


def _as_many_as_fit(items: Sequence[str], window: int, size: Callable[[Sequence[str]], int]) -> list[str]:
    kept: list[str] = []
    for item in items:
        if size([*kept, item]) > window:
            break
        kept.append(item)
    return kept


# --- scores ---


def overlap(answer: Iterable[Location], truth: Iterable[Location]) -> float:
    """Mean of the F1 over files and the F1 over (file, element) pairs, in [0, 1]."""
    named, right = set(answer), set(truth)
    return (_f1({path for path, _ in named}, {path for path, _ in right}) + _f1(named, right)) / 2


def _f1(named: set, right: set) -> float:
    common = len(named & right)
    return 2 * common / (len(named) + len(right)) if common else 0.0
