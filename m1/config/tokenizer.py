"""The vocabulary."""

from __future__ import annotations

from pydantic import Field

from m1.config.base import Section


class Tokenizer(Section):
    """Byte-level BPE trained on the corpus. Its vocabulary size is `model.vocab_size`."""

    train_megabytes: float = Field(gt=0)
