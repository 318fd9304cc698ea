"""Write documents as a Megatron indexed data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

import m1.model  # noqa: F401  (prepares Megatron-core for this machine; unprepared, its import takes twice as long)
from m1.tokenizer import Tokenizer
from stages.tokens.split import Document

_BATCH = 64


def write_indexed(documents: Iterable[Document], tokenizer: Tokenizer, prefix: Path) -> Counter[str]:
    """Write `<prefix>.bin` and `<prefix>.idx`: one sequence per document, each ended by `<end_of_document>`.

    Ids are stored as uint16 where the vocabulary allows it, else int32.

    Returns:
        Tokens per domain.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    tokens: Counter[str] = Counter()
    documents = list(documents)
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch])):
            ids.append(tokenizer.end_of_document_id)
            builder.add_document(torch.from_numpy(np.array(ids, dtype=np.int64)), [len(ids)])
            tokens[document.domain] += len(ids)
    builder.finalize(f"{prefix}.idx")
    return tokens
