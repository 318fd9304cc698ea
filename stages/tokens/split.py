"""Which documents are held out: decided by their content alone, the same share of every domain."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A document of the corpus."""

    domain: str
    text: str

    @property
    def content_hash(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def heldout_hashes(documents: list[Document], fraction: float) -> set[str]:
    """Content hashes of the held-out documents.

    In each domain, contents in the order of their hash are held out until they reach `fraction` of the domain's bytes;
    a domain with two contents or more holds out at least one and keeps at least one. Equal texts share a hash, so no
    text is on both sides, whatever its domain.
    """
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    seen: set[str] = set()
    for document in documents:
        identity = document.content_hash
        if identity not in seen:
            seen.add(identity)
            sizes[document.domain][identity] = len(document.text.encode())
    heldout: set[str] = set()
    for contents in sizes.values():
        budget = fraction * sum(contents.values())
        for identity in sorted(contents)[:-1]:
            if budget <= 0:
                break
            heldout.add(identity)
            budget -= contents[identity]
    return heldout
