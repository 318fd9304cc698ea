"""Tokenise the corpus of a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1 import paths
from m1.config.profile import Profile
from m1.config.tokens import Tokens
from m1.errors import UsageError
from m1.files import read_rows
from m1.run.contract import Summary
from m1.tokenizer import load_tokenizer
from stages.tokens.split import Document, heldout_hashes
from stages.tokens.write import write_indexed

_AGAIN = "Make it again: python -m stages.corpus."


def run(profile: Profile, output: Path) -> Summary:
    """Write `train.{bin,idx}` and `heldout.{bin,idx}`; documents stay in the order of the corpus."""
    corpus = paths.data_dir(profile.name, "corpus") / "documents.jsonl"
    if not corpus.is_file():
        raise UsageError(f"no corpus at {corpus}", f"Make it: python -m stages.corpus --profile {profile.name}.")
    tokenizer = load_tokenizer(paths.data_dir(profile.name, "tokenizer"))
    documents = [_document(row, corpus, number) for number, row in enumerate(read_rows(corpus, _AGAIN), 1)]
    heldout = heldout_hashes(documents, profile.section("tokens", Tokens).heldout_fraction)
    if not heldout:
        raise UsageError("tokens: no domain of the corpus has two documents, so none can be held out", "Enlarge it.")
    summary: Summary = {}
    for split in ("train", "heldout"):
        chosen = [document for document in documents if (document.content_hash in heldout) == (split == "heldout")]
        tokens = write_indexed(chosen, tokenizer, output / split)
        summary[split] = {
            "documents": len(chosen),
            "tokens": sum(tokens.values()),
            "tokens_per_domain": dict(sorted(tokens.items())),
        }
    return summary


def _document(row: dict[str, Any], corpus: Path, number: int) -> Document:
    domain, text = row.get("domain"), row.get("text")
    if not isinstance(domain, str) or not isinstance(text, str):
        raise UsageError(f"{corpus}:{number} is damaged: no domain or no text", _AGAIN)
    return Document(domain, text)
