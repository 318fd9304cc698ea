"""Train the tokenizer of a profile on its corpus."""

from __future__ import annotations

from pathlib import Path

from m1 import paths
from m1.config.profile import Profile
from m1.config.tokenizer import Tokenizer as Section
from m1.errors import UsageError
from m1.run.contract import Summary
from stages.tokenizer.train import measure, read_texts, save, train

#: Bytes of the corpus on which the summary measures compression.
_SAMPLE = 1e6


def run(profile: Profile, output: Path) -> Summary:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    section = profile.section("tokenizer", Section)
    documents = paths.data_dir(profile.name, "corpus") / "documents.jsonl"
    if not documents.is_file():
        raise UsageError(f"no corpus at {documents}", f"Make it: python -m stages.corpus --profile {profile.name}.")
    texts = list(read_texts(documents, section.train_megabytes * 1e6))
    if not texts:
        raise UsageError(
            f"tokenizer.train_megabytes={section.train_megabytes} is less than the first document",
            "Raise it.",
        )
    tokenizer = train(texts, profile.model.vocab_size)
    save(tokenizer, output)
    return {
        "vocab_size": profile.model.vocab_size,
        "trained_on": {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)},
        "sample": measure(tokenizer, read_texts(documents, _SAMPLE)),
    }
