"""Faulty versions of a package, in a fixed order that depends on the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from m1.tasks.swe.answers import is_guarded
from m1.tasks.swe.mutations import Mutation, choose, combine, mutant, mutations
from m1.tasks.swe.patches import Tree
from m1.tasks.swe.python_source import NotPython, PythonSource
from m1.tasks.swe.sources import Package
from m1.tasks.swe.tasks import content_id

#: Every fourth candidate joins two or three mutations of one file.
COMBINED_EVERY = 4
#: Single mutations of one function.
PER_ELEMENT = 3


@dataclass(frozen=True)
class Candidate:
    """A faulty version of one file.

    Attributes:
        id: content hash of the source, the path and the faulty file.
        origin: `mutation` or `combined`.
        lines: ranges of lines of the right file that are touched, first and last.
    """

    id: str
    origin: str
    kinds: tuple[str, ...]
    path: str
    content: bytes
    element: str
    lines: tuple[tuple[int, int], ...]

    def tree(self, right: Mapping[str, bytes]) -> Tree:
        return {**right, self.path: self.content}


class Sites:
    """Where faults can be put: the mutations of all code files whose lines some test runs.

    Attributes:
        found: all mutations; covered: those that tests reach.
    """

    def __init__(
        self, package: Package, tree: Mapping[str, bytes], lines: Mapping[str, Mapping[str, Sequence[str]]]
    ) -> None:
        self.sources: dict[str, PythonSource] = {}
        self.found = 0
        self.covered: list[tuple[str, Mutation]] = []
        for path in sorted(path for path in tree if package.is_code(path) and not is_guarded(path)):
            try:
                source = PythonSource(tree[path])
            except NotPython:
                continue
            reached = {int(line) for line, tests in lines.get(path, {}).items() if any(tests)}
            self.sources[path] = source
            for mutation in mutations(source):
                self.found += 1
                if any(mutation.lines[0] <= line <= mutation.lines[1] for line in reached):
                    self.covered.append((path, mutation))


def candidates(package: Package, sites: Sites, seed: str) -> Iterator[Candidate]:
    """Real mutants without repetition, single and combined ones interleaved."""
    singles = choose(sites.covered, random.Random(f"{seed}/{package.name}/single"), PER_ELEMENT)
    generator = random.Random(f"{seed}/{package.name}/combined")
    by_path: dict[str, list[Mutation]] = {}
    for path, mutation in sites.covered:
        by_path.setdefault(path, []).append(mutation)
    seen: set[str] = set()
    for number, (path, mutation) in enumerate(singles, 1):
        proposals: list[tuple[str, tuple[Mutation, ...]]] = [(path, (mutation,))]
        if number % (COMBINED_EVERY - 1) == 0:
            parts = tuple(generator.sample(by_path[path], min(len(by_path[path]), generator.choice((2, 3)))))
            proposals.append((path, parts))
        for place, parts in proposals:
            made = _make(package, sites.sources[place], place, parts)
            if made is not None and made.id not in seen:
                seen.add(made.id)
                yield made


def _make(package: Package, source: PythonSource, path: str, parts: Sequence[Mutation]) -> Candidate | None:
    mutation = parts[0] if len(parts) == 1 else combine(parts)
    content = mutant(source, mutation) if mutation is not None else None
    if mutation is None or content is None:
        return None
    return Candidate(
        content_id(package.name, path, content.decode("utf-8")),
        "mutation" if len(parts) == 1 else "combined",
        tuple(sorted(part.kind for part in parts)),
        path,
        content,
        mutation.element,
        tuple(part.lines for part in parts),
    )
