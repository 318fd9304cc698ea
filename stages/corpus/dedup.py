"""Duplicate documents: equal ones by hash, near-equal ones by MinHash.

Signatures are datatrove's (its normalisation, shingles and hash functions). Its bucket, cluster and filter steps work
through files, for many machines; here the corpus fits in memory, so bands are matched in a dictionary.
"""

from __future__ import annotations

import hashlib
import tempfile

import numpy as np
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig

from m1.data.corpus_spec import NearDuplicates
from stages.corpus.filters import WORDS


def content_hash(text: str) -> str:
    """SHA-256 of the text, 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def find_duplicates(texts: list[str], rules: NearDuplicates) -> dict[int, tuple[str, int]]:
    """Texts to remove because an earlier text equals or nearly equals them.

    A text is compared with kept texts only, so every removed text has a kept one that it resembles.

    Returns:
        index -> (reason, index of the kept text); reasons are "exact_duplicate" and "near_duplicate".
    """
    # SHA-1, because the default calls xxhash with text, which newer releases of xxhash refuse.
    config = MinhashConfig(
        n_grams=rules.n_grams,
        num_buckets=rules.buckets,
        hashes_per_bucket=rules.hashes_per_bucket,
        seed=1,
        hash_config=HashConfig(hash_fc="sha1"),
        norm_config=TextNormConfig(norm_unicode_diacritics=False),  # costs half the time, and changes little in English
    )
    with tempfile.TemporaryDirectory() as unused:  # the step wants a folder, its in-memory parts write nothing
        signer = MinhashDedupSignature(unused, config, language=WORDS)
    removed: dict[int, tuple[str, int]] = {}
    first_with_hash: dict[str, int] = {}
    bands: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(rules.buckets)]
    signatures: dict[int, np.ndarray] = {}
    for index, text in enumerate(texts):
        original = first_with_hash.setdefault(content_hash(text), index)
        if original != index:
            removed[index] = ("exact_duplicate", original)
            continue
        shingles = signer.get_shingles(text)
        if not len(shingles):
            continue  # shorter than one n-gram: only exact duplicates count
        signature = [tuple(band) for band in signer.get_signature(np.unique(shingles).reshape(-1, 1))]
        flat = np.array(signature).ravel()
        candidates = sorted({other for band, key in zip(bands, signature) for other in band.get(key, ())})
        for other in candidates:
            if np.mean(signatures[other] == flat) >= rules.min_similarity:
                removed[index] = ("near_duplicate", other)
                break
        else:
            signatures[index] = flat
            for band, key in zip(bands, signature):
                band.setdefault(key, []).append(index)
    return removed
