"""A small hybrid, built once per module, in a process group of this process alone."""

from __future__ import annotations

import pytest
import torch
from small_model import ALONE, SMALL, logits_of  # noqa: F401  (logits_of: for those who import it from here)


@pytest.fixture(scope="module")
def hybrid():
    """The small hybrid with a RoPE base that is not the default, in evaluation mode."""
    from m1.model.hybrid import build_model
    from m1.training import parallel

    parallel.initialize(ALONE, 1)
    return build_model(SMALL, ALONE, seed=7, rotary_base=50_000.0).eval()


@pytest.fixture
def tokens():
    """Two sequences of 600 tokens: more than two blocks of transformers' lightning attention and not a multiple."""
    return torch.randint(0, SMALL.vocab_size, (2, 600), generator=torch.Generator().manual_seed(3))
