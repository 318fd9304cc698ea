"""Tokenise the corpus of a profile."""

from __future__ import annotations

import json
from pathlib import Path

from m1 import paths
from m1.config.profile import Profile
from m1.config.tokens import Tokens
from m1.errors import UsageError
from m1.run.contract import Summary
from m1.tokenizer import load_tokenizer
from stages.tokens.split import Document, heldout_hashes
from stages.tokens.write import write_indexed


def run(profile: Profile, output: Path) -> Summary:
    """Write `train.{bin,idx}` and `heldout.{bin,idx}`; documents stay in the order of the corpus."""
    corpus = paths.data_dir(profile.name, "corpus") / "documents.jsonl"
    if not corpus.is_file():
        raise UsageError(f"no corpus at {corpus}", f"Make it: python -m stages.corpus --profile {profile.name}.")
    tokenizer = load_tokenizer(paths.data_dir(profile.name, "tokenizer"))
    with open(corpus, encoding="utf-8") as file:
        documents = [Document(content["domain"], content["text"]) for content in map(json.loads, file)]
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
