"""Train the tokenizer of a profile on its corpus: `python -m stages.tokenizer --profile tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m1 import paths
from m1.errors import UsageError
from m1.profile import Profile
from m1.stage import data_main
from stages.tokenizer.train import measure, read_texts, save, train

#: Bytes of the corpus on which the summary measures compression.
_SAMPLE = 1e6


def run(settings: Profile, output: Path) -> dict[str, Any]:
    """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
    documents = paths.data_dir(settings.name, "corpus") / "documents.jsonl"
    if not documents.is_file():
        raise UsageError(f"no corpus at {documents}", f"Make it: python -m stages.corpus --profile {settings.name}.")
    texts = list(read_texts(documents, settings.tokenizer.train_megabytes * 1e6))
    if not texts:
        raise UsageError(
            f"tokenizer.train_megabytes={settings.tokenizer.train_megabytes} is less than the first document",
            "Raise it.",
        )
    tokenizer = train(texts, settings.model.vocab_size)
    save(tokenizer, output)
    return {
        "vocab_size": settings.model.vocab_size,
        "trained_on": {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)},
        "sample": measure(tokenizer, read_texts(documents, _SAMPLE)),
    }


if __name__ == "__main__":
    data_main(run)
