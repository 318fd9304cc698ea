"""Compares an exported folder, loaded by transformers alone, with the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from m1 import chat
from m1.errors import StageFailed, UsageError
from m1.model.hybrid import HybridModel

QUESTION = "Compute 3 + 4 * 2."
NEW_TOKENS = 32


@dataclass(frozen=True)
class Comparison:
    """Largest absolute differences of log-probabilities, over every position and the whole vocabulary.

    Attributes:
        tokens: length of the sequence.
        prefill: the whole sequence at once.
        decode: its second half token by token, on the cache that the first half left.
        greedy: by how much the training model prefers another token at any step of a greedy answer; 0 if it never does.
        answer: that answer.
    """

    tokens: int
    prefill: float
    decode: float
    greedy: float
    answer: str

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)


def heldout_tokens(prefix: Path, count: int) -> Tensor:
    """The first `count` tokens of the held-out documents of an indexed data set, int64 (1, count).

    Raises:
        UsageError: the data set is missing or shorter than that.
    """
    if not prefix.with_name(prefix.name + ".idx").is_file():
        raise UsageError(f"export: no indexed data set {prefix}", "Run the stage tokens first.")
    documents = IndexedDataset(str(prefix))
    found: list[int] = []
    for i in range(len(documents)):
        found += documents[i][: count - len(found)].tolist()
        if len(found) == count:
            return torch.tensor([found])
    raise UsageError(
        f"export.check_tokens={count}, but {prefix} holds {len(found)} tokens", "Lower export.check_tokens."
    )


@torch.no_grad()
def logprobs(model: HybridModel, tokens: Tensor) -> Tensor:
    """Log-probabilities of the training model over the vocabulary; tokens (1, n) -> float32 (1, n, vocabulary)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None).float().log_softmax(-1)


@torch.no_grad()
def compare(folder: Path, trained: HybridModel, tokens: Tensor) -> Comparison:
    """Load `folder` with nothing but transformers and run it beside the training model, both in float32."""
    device = next(trained.parameters()).device
    tokens = tokens.to(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = logprobs(trained, tokens)
    prefill = _distance(model(tokens).logits.log_softmax(-1), expected)
    start = max(1, tokens.shape[1] // 2)
    state = model(tokens[:, :start], use_cache=True)
    steps = [state.logits.log_softmax(-1)]
    for i in range(start, tokens.shape[1]):
        # As `generate` does: asked for the position itself, the cache answers 0 while its first layer is lightning.
        at = torch.tensor([[i]], device=device)
        state = model(tokens[:, i : i + 1], position_ids=at, past_key_values=state.past_key_values, use_cache=True)
        steps.append(state.logits.log_softmax(-1))
    decode = _distance(torch.cat(steps, dim=1), expected)
    greedy, answer = _greedy_answer(model, tokenizer, trained)
    return Comparison(tokens.shape[1], prefill, decode, greedy, answer)


def require(found: Comparison, tolerance: float) -> None:
    """Raise StageFailed unless every difference is within the tolerance (a NaN is not)."""
    # A chosen token may trail by the error of two log-probabilities, its own and that of the better one.
    limits = {"prefill": tolerance, "decode": tolerance, "greedy": 2 * tolerance}
    failed = [
        f"{name} {getattr(found, name):.3g}" for name, limit in limits.items() if not getattr(found, name) <= limit
    ]
    if failed:
        raise StageFailed(
            f"export: log-probabilities of the exported and the training model differ by {', '.join(failed)} over "
            f"{found.tokens} tokens, more than export.tolerance={tolerance:g}",
            "Nothing was exported. Two experts that tie at one token may be ordered differently: try another "
            "export.check_tokens before looking for a fault in m1/model/convert.py.",
        )


def _greedy_answer(model: Any, tokenizer: Any, trained: HybridModel) -> tuple[float, str]:
    """Answer a question through the chat template; how far each choice is from the training model's own."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    own = tokenizer.encode(chat.render_prompt(QUESTION), add_special_tokens=False)
    if prompt["input_ids"][0].tolist() != own:
        raise StageFailed(
            "export: the tokenizer's chat template renders another prompt than the one the model was trained on",
            "Correct the template of the tokenizer stage.",
        )
    output = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None)
    answer = output[0, len(own) :]
    preferred = logprobs(trained, output[:, :-1])[0, len(own) - 1 :]
    chosen = preferred.gather(1, answer[:, None])[:, 0]
    return float((preferred.max(-1).values - chosen).max()), tokenizer.decode(answer)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
