"""Raw documents of a source, read without unpacking anything to disk."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.data.corpus_spec import DebianSource, HubSource, LocalSource, PypiSource
from m1.data.fetch import fetch
from m1.data.hub import json_lines
from m1.errors import M1Error, UsageError
from m1.rows import Reject, objects

FileSource = PypiSource | DebianSource | LocalSource


@dataclass
class Files:
    """Files of one source, path -> content in order of path."""

    texts: dict[str, bytes]
    licences: dict[str, bytes]


@dataclass(frozen=True)
class Unusable:
    """A document that cannot be read, and why."""

    reason: str


def read_files(sources: Sequence[FileSource]) -> dict[str, Files]:
    """Files that the patterns of each source name, by the name of the source; every archive is read once.

    Raises:
        UsageError: no file matches a source's `include` or `licence_files`.
    """
    found = {source.name: Files({}, {}) for source in sources}
    for group in _by_origin(sources):
        wanted: list[tuple[dict[str, bytes], Callable[[str], bool]]] = []
        for source in group:
            wanted.append((found[source.name].texts, _matcher(source.include, source.exclude)))
            wanted.append((found[source.name].licences, _matcher(source.licence_files, [])))
        for path, content in _files(group[0], functools.partial(_any_matches, wanted)):
            for files, matches in wanted:
                if matches(path):
                    # Names that are not UTF-8 are told apart by their bytes, as \udcXX.
                    files[path.encode("utf-8", "backslashreplace").decode()] = content
    for source in sources:
        result = found[source.name]
        for field, matched in (("include", result.texts), ("licence_files", result.licences)):
            if not matched:
                raise UsageError(
                    f"source {source.name}: {field} {getattr(source, field)} matches no file", "Correct it in the spec."
                )
        found[source.name] = Files(dict(sorted(result.texts.items())), dict(sorted(result.licences.items())))
    return found


def _any_matches(wanted: list[tuple[dict[str, bytes], Callable[[str], bool]]], path: str) -> bool:
    return any(matches(path) for _, matches in wanted)


def _by_origin(sources: Sequence[FileSource]) -> list[list[FileSource]]:
    """Sources grouped by the archive or folder they are in."""
    groups: dict[str, list[FileSource]] = {}
    for source in sources:
        groups.setdefault(str(source.folder) if isinstance(source, LocalSource) else source.sha256, []).append(source)
    return list(groups.values())


def read_rows(source: HubSource) -> Iterator[tuple[str, bytes | Unusable]]:
    """(row number, text in UTF-8) of a data set.

    Files of JSON lines in a local folder are read one line at a time, so that a bad one costs that line; which of them
    a split consists of, and everything else, is left to `datasets`.

    Raises:
        UsageError: no row has the column of the text.
        M1Error: the data set cannot be read.
    """
    columns: set[str] = set()
    found = False
    for number, row in enumerate(itertools.islice(_rows(source), source.max_rows)):
        if isinstance(row, Reject):
            yield f"row-{number:09d}", Unusable("not_json")
            continue
        columns |= row.keys()
        found = found or source.text_column in row
        yield f"row-{number:09d}", _encoded(row.get(source.text_column))
    if columns and not found:
        raise UsageError(
            f"source {source.name}: no column {source.text_column}; the data set has "
            f"{', '.join(sorted(columns))[:500]}",
            "Correct text_column in the spec.",
        )


def _encoded(text: object) -> bytes | Unusable:
    if not isinstance(text, str):
        return Unusable("no_text")
    try:
        return text.encode()
    except UnicodeEncodeError:
        return Unusable("lone_surrogate")


def _rows(source: HubSource) -> Iterator[dict[str, Any] | Reject]:
    import datasets  # imported here: it takes seconds, and few corpora need it

    try:
        if Path(source.location).is_dir():
            files = json_lines(Path(source.location), source.config, source.split)
            for file in files:
                yield from (row for _, row in objects(file))
            if files:
                return
        yield from datasets.load_dataset(
            source.location, source.config, split=source.split, revision=source.revision, streaming=True
        )
    except M1Error:
        raise
    except Exception as error:  # hub, network and format errors come in many kinds
        where = "Check the files of the folder." if Path(source.location).is_dir() else "Check the network, too."
        raise M1Error(
            f"source {source.name}: cannot read the data set {source.dataset}: {type(error).__name__}: {error}",
            f"Check its name, config, split and revision. {where}",
        ) from error


def _files(source: FileSource, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every wanted file, from wherever the source is."""
    if isinstance(source, LocalSource):
        if not source.folder.is_dir():
            raise UsageError(f"source {source.name}: no folder {source.folder}", "Correct path in the spec.")
        yield from _folder(source.folder, wanted)
        return
    archive = fetch(source)
    if isinstance(source, DebianSource):
        with tempfile.TemporaryDirectory() as folder:
            _unpack_debian(source, archive, folder)
            yield from _folder(Path(folder), wanted)
    elif source.kind == "pypi-wheel" or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir() and wanted(entry.filename):
                    yield entry.filename, wheel.read(entry)
    else:
        with tarfile.open(archive) as sdist:
            for member in sdist:
                path = member.name.partition("/")[2]  # without the top folder package-version/
                if member.isfile() and wanted(path):
                    yield path, sdist.extractfile(member).read()  # type: ignore[union-attr]


def _unpack_debian(source: DebianSource, archive: Path, folder: str) -> None:
    if shutil.which("dpkg") is None:
        raise M1Error(f"source {source.name}: dpkg is not on this machine", "Leave Debian sources out.")
    done = subprocess.run(
        ["dpkg", "-x", archive, folder], capture_output=True, text=True, check=False, encoding="utf-8", errors="replace"
    )
    if done.returncode:
        raise M1Error(f"source {source.name}: dpkg -x {archive} failed: {done.stderr.strip()}", "Remove the file.")


def _folder(root: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root).as_posix()
        if wanted(path) and file.is_file() and not file.is_symlink():
            yield path, file.read_bytes()


def _matcher(include: list[str], exclude: list[str]) -> Callable[[str], bool]:
    """Whether a path matches one of `include` and none of `exclude`."""
    included = [_pattern(glob) for glob in include]
    excluded = [_pattern(glob) for glob in exclude]
    return functools.cache(
        lambda path: any(p.fullmatch(path) for p in included) and not any(p.fullmatch(path) for p in excluded)
    )


def _pattern(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay within one folder, `**` spans any number of folders (also none)."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
