"""From a corpus spec to `documents.jsonl`: read, clean, filter, de-duplicate, mix, cut."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from m1.data.corpus_spec import CorpusSpec, Filters, HubSource, Source
from m1.errors import UsageError
from stages.corpus import filters, mixture
from stages.corpus.dedup import find_duplicates
from stages.corpus.extract import Unreadable, extract
from stages.corpus.read import Files, Unusable, read_files, read_rows


@dataclass
class Document:
    """One document: `id` is source/path, unique in the corpus."""

    id: str
    source: Source
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    def line(self, **more: Any) -> str:
        """Its line in a JSON-lines file."""
        content = {
            "id": self.id,
            "source": self.source.name,
            "domain": self.source.domain,
            "licence": self.source.licence,
            **more,
            "text": self.text,
        }
        return json.dumps(content, ensure_ascii=False) + "\n"


@dataclass
class Tally:
    """What became of the documents of one source."""

    documents_found: int = 0
    documents_read: int = 0
    bytes_read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    documents_clean: int = 0
    bytes_clean: int = 0
    documents_kept: int = 0
    bytes_kept: int = 0


def build(spec: CorpusSpec, *, max_bytes: int, seed: int, output: Path) -> dict[str, Any]:
    """Write `documents.jsonl`, `rejected.jsonl` and `licences/` to `output`; return the summary.

    The same spec, size and seed give the same bytes on every machine.

    Raises:
        UsageError: a source has nothing to give, or the whole corpus is empty.
        M1Error: a source cannot be had.
    """
    tallies = {source.name: Tally() for source in spec.sources}
    with open(output / "rejected.jsonl", "w", encoding="utf-8", newline="\n") as rejects:
        clean: list[Document] = []
        files = read_files([source for source in spec.sources if not isinstance(source, HubSource)])
        _write_licences(files, output / "licences")
        total_weight = sum(source.weight for source in spec.sources)
        for source in spec.sources:
            raw = read_rows(source) if isinstance(source, HubSource) else files[source.name].texts.items()
            enough = spec.headroom * max_bytes * source.weight / total_weight
            clean.extend(_clean(source, raw, spec, enough, seed, tallies[source.name], rejects))
        duplicates = find_duplicates([document.text for document in clean], spec.near_duplicates)
        for index, (reason, original) in duplicates.items():
            tallies[clean[index].source.name].rejected[reason] += 1
            rejects.write(clean[index].line(reason=reason, duplicate_of=clean[original].id))
    unique = [document for index, document in enumerate(clean) if index not in duplicates]
    for document in unique:
        tallies[document.source.name].documents_clean += 1
        tallies[document.source.name].bytes_clean += document.size
    selected = _select(unique, spec, tallies, max_bytes, seed)
    written = _write(selected, spec, seed, output / "documents.jsonl")
    return _summary(spec, tallies, written)


def _write_licences(files: dict[str, Files], folder: Path) -> None:
    """The sources' own licence texts, one file per source."""
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.txt").write_bytes(b"\n\n".join(content.licences.values()))


def _clean(
    source: Source,
    raw: Iterable[tuple[str, bytes | Unusable]],
    spec: CorpusSpec,
    enough: float,
    seed: int,
    tally: Tally,
    rejects: TextIO,
) -> list[Document]:
    """Documents of one source that pass extraction and filters, in an order of the seed, until they are `enough` bytes.

    Documents that do not pass go to `rejects` with the reason; those after the last needed are not looked at.
    """
    checks = filters.build(spec.filters.get(source.domain, Filters()))
    documents: list[Document] = []
    size = 0
    for path, content in sorted(raw, key=lambda item: _order(seed, f"{source.name}/{item[0]}")):
        tally.documents_found += 1
        if size >= enough:
            continue
        tally.documents_read += 1
        text, reason = "", content.reason if isinstance(content, Unusable) else None
        if not isinstance(content, Unusable):
            tally.bytes_read += len(content)
            try:
                text = extract(content, source.format, source.boilerplate)
                reason = filters.rejection(text, checks)
            except Unreadable as error:
                text, reason = "", str(error)
        document = Document(f"{source.name}/{path}", source, text)
        if reason is None:
            documents.append(document)
            size += document.size
        else:
            tally.rejected[reason] += 1
            rejects.write(document.line(reason=reason))
    return documents


def _select(
    documents: list[Document], spec: CorpusSpec, tallies: dict[str, Tally], max_bytes: int, seed: int
) -> list[Document]:
    """Documents up to each source's quota, chosen in an order that depends on the seed and their ids alone."""
    empty = [name for name, tally in tallies.items() if not tally.bytes_clean]
    if empty:
        raise UsageError(
            f"source {empty[0]} has no document left after cleaning ({dict(tallies[empty[0]].rejected)})",
            "Correct its patterns or the filters of its domain in the spec, or remove it.",
        )
    weights = {source.name: source.weight for source in spec.sources}
    available = {name: tally.bytes_clean for name, tally in tallies.items()}
    left = mixture.quotas(weights, available, max_bytes)
    selected = []
    for document in sorted(documents, key=lambda document: _order(seed, document.id)):
        if document.size <= left[document.source.name]:
            left[document.source.name] -= document.size
            tallies[document.source.name].documents_kept += 1
            tallies[document.source.name].bytes_kept += document.size
            selected.append(document)
    if not selected:
        raise UsageError(f"corpus.max_megabytes={max_bytes / 1e6} is smaller than every document", "Raise it.")
    return selected


def _order(seed: int, identity: str) -> bytes:
    return hashlib.sha256(f"{seed}:{identity}".encode()).digest()


def _write(documents: list[Document], spec: CorpusSpec, seed: int, path: Path) -> int:
    """Write the documents, cut and shuffled; returns the number of lines."""
    parts = []
    for document in documents:
        texts = mixture.split_document(document.text, spec.max_document_characters)
        for number, text in enumerate(texts):
            identity = document.id if len(texts) == 1 else f"{document.id}#{number}"
            parts.append(Document(identity, document.source, text))
    parts.sort(key=lambda part: _order(seed, part.id))
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(part.line() for part in parts)
    return len(parts)


def _summary(spec: CorpusSpec, tallies: dict[str, Tally], written: int) -> dict[str, Any]:
    """Plain values for `summary.json`: totals, shares of the domains, and every source's account."""
    total = sum(tally.bytes_kept for tally in tallies.values())
    domains: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    for source in spec.sources:
        domains[source.domain] += tallies[source.name].bytes_kept
        rejected += tallies[source.name].rejected
    return {
        "documents": written,
        "bytes": total,
        "domain_shares": {domain: round(size / total, 4) for domain, size in sorted(domains.items())},
        "rejected": dict(sorted(rejected.items())),
        "sources": {source.name: _account(source, tallies[source.name]) for source in spec.sources},
    }


def _account(source: Source, tally: Tally) -> dict[str, Any]:
    account: dict[str, Any] = {"kind": source.kind, "licence": source.licence, "domain": source.domain}
    for name in ("package", "version", "sha256"):
        if hasattr(source, name):
            account[name] = getattr(source, name)
    account |= vars(tally) | {"rejected": dict(sorted(tally.rejected.items()))}
    return account
