"""Compares an exported folder, read by itself, with the model it was made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from m1 import chat
from m1.config.model import Model
from m1.errors import StageFailed, UsageError
from m1.formats.folder import open_folder
from m1.formats.layouts import MINIMAX_M1
from m1.formats.mapping import FolderReader, Form, Source, trained, trained_shapes
from m1.formats.released import ReleasedModel
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
def compare(folder: Path, layout: str, trained: HybridModel, tokens: Tensor) -> Comparison:
    """Load `folder` by itself and run it beside the training model, both in float32."""
    device = next(trained.parameters()).device
    tokens = tokens.to(device)
    model = Released(folder) if layout == MINIMAX_M1 else Transformers(folder, device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = logprobs(trained, tokens)
    prefill = _distance(model.read(tokens)[0].log_softmax(-1), expected)
    start = max(1, tokens.shape[1] // 2)
    logits, state = model.read(tokens[:, :start])
    steps = [logits.log_softmax(-1)]
    for i in range(start, tokens.shape[1]):
        logits, state = model.step(tokens[:, i : i + 1], i, state)
        steps.append(logits.log_softmax(-1))
    decode = _distance(torch.cat(steps, dim=1), expected)
    greedy, answer = _greedy_answer(model, tokenizer, trained)
    return Comparison(tokens.shape[1], prefill, decode, greedy, answer)


class Transformers:
    """A folder of the transformers layout as transformers computes it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()

    def read(self, tokens: Tensor) -> tuple[Tensor, Any]:
        found = self.model(tokens, use_cache=True)
        return found.logits, found.past_key_values

    def step(self, token: Tensor, position: int, state: Any) -> tuple[Tensor, Any]:
        # As `generate` does: asked for the position itself, the cache answers 0 while its first layer is lightning.
        at = torch.tensor([[position]], device=token.device)
        found = self.model(token, position_ids=at, past_key_values=state, use_cache=True)
        return found.logits, found.past_key_values

    def greedy(self, prompt: Tensor) -> Tensor:
        settings = dict(do_sample=False, temperature=None, top_p=None)
        mask = torch.ones_like(prompt)
        return self.model.generate(prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, **settings)


class Released:
    """A folder of the released layout as its definition computes it (`m1.formats.released`)."""

    def __init__(self, folder: Path) -> None:
        self.model = ReleasedModel(folder)

    def read(self, tokens: Tensor) -> tuple[Tensor, Any]:
        logits, state = self.model.logits(tokens.cpu())
        return logits.to(tokens.device), state

    def step(self, token: Tensor, position: int, state: Any) -> tuple[Tensor, Any]:
        logits, state = self.model.logits(token.cpu(), state)
        return logits.to(token.device), state

    def greedy(self, prompt: Tensor) -> Tensor:
        output = prompt
        logits, state = self.read(prompt)
        for _ in range(NEW_TOKENS):
            output = torch.cat((output, logits[:, -1:].argmax(-1)), dim=1)
            logits, state = self.step(output[:, -1:], output.shape[1] - 1, state)
        return output


def weights(folder: Path, source: Source, model: Model, form: Form) -> int:
    """Read every parameter back from `folder` as `pretrain.init_from` does, one at a time; returns how many there are.

    Raises:
        StageFailed: one is not, bit for bit, what the training model has, in the type that the export keeps it in.
    """
    names = trained_shapes(model)
    with FolderReader(open_folder(folder), model) as read:
        for name in names:
            expected = source(name).detach().to("cpu", form.dtype(name))
            if not torch.equal(trained(read, name, model, form.layout), expected):
                raise StageFailed(
                    f"export: {name} read back from the exported files is not the trained parameter",
                    "Nothing was exported. Rerun; if it happens again, test the disk and m1/formats/weights.py.",
                )
    return len(names)


def require(found: Comparison, tolerance: float) -> None:
    """Raise StageFailed unless every difference is within the tolerance (a NaN is not)."""
    # A chosen token may trail by the error of two log-probabilities, its own and that of the better one.
    limits = {"prefill": tolerance, "decode": tolerance, "greedy": 2 * tolerance}
    unsaid = [f"{name} {getattr(found, name)}" for name in limits if not math.isfinite(getattr(found, name))]
    if unsaid:
        raise StageFailed(
            f"export: log-probabilities of the exported or the training model are not finite numbers: "
            f"{', '.join(unsaid)} over {found.tokens} tokens",
            "Nothing was exported. Look at the losses of the runs before; export one from before they went.",
        )
    failed = [
        f"{name} {getattr(found, name):.3g}" for name, limit in limits.items() if not getattr(found, name) <= limit
    ]
    if failed:
        raise StageFailed(
            f"export: log-probabilities of the exported and the training model differ by {', '.join(failed)} over "
            f"{found.tokens} tokens, more than export.tolerance={tolerance:g}",
            "Nothing was exported. Two experts that tie at one token may be ordered differently: try another "
            "export.check_tokens before looking for a fault in m1/formats/convert.py or weights.py.",
        )


def _greedy_answer(model: Transformers | Released, tokenizer: Any, trained: HybridModel) -> tuple[float, str]:
    """Answer a question through the chat template; how far each choice is from the training model's own."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].to(next(trained.parameters()).device)
    own = tokenizer.encode(chat.render_prompt(QUESTION), add_special_tokens=False)
    if prompt[0].tolist() != own:
        raise StageFailed(
            "export: the tokenizer's chat template renders another prompt than the one the model was trained on",
            "Correct the template of the tokenizer stage.",
        )
    output = model.greedy(prompt)
    answer = output[0, len(own) :]
    preferred = logprobs(trained, output[:, :-1])[0, len(own) - 1 :]
    chosen = preferred.gather(1, answer[:, None])[:, 0]
    return float((preferred.max(-1).values - chosen).max()), tokenizer.decode(answer)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
