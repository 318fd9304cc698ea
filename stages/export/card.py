"""The model card: what was exported, from which runs and data, and how it was checked."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from m1 import arithmetic
from m1.stage import StageContext, load_result
from stages.corpus import spec
from stages.export import files
from stages.export.check import QUESTION, Comparison

_USAGE = f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{QUESTION}"}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))
```"""


def render(context: StageContext, found: Comparison, rotary_base: float, size: int) -> str:
    """Text of `README.md`."""
    settings = context.profile
    model = settings.model
    counts = arithmetic.parameters(model)
    softmax = arithmetic.softmax_layers(model)
    corpus = spec.load(settings.corpus.spec)
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: other\n---",
        f"# m1-{settings.name}",
        f"A reasoning model made by the MiniMax-M1 recipe (arXiv 2506.13585), profile `{settings.name}`, seed "
        f"{settings.seed}: {model.num_layers} layers ({model.num_layers - softmax} lightning, {softmax} softmax "
        f"attention), {model.num_experts} experts of which {model.moe_router_topk} are used, {counts.total:,} "
        f"parameters ({counts.active:,} active outside embedding and head), {size:,} bytes of weights "
        f"({settings.parallel.precision}; router and LM head float32), vocabulary {model.vocab_size:,}.",
        "## Use",
        _USAGE,
        _table(
            "## How it was made",
            ["stage", "fingerprint", "metric", "before", "after"],
            [_stage_row(Path(folder)) for _, folder in context.request.history],
        ),
        _table(
            "Data sets read by the export, with the hash that DVC recorded:",
            ["data set", "hash"],
            [[name, f"`{digest}`"] for name, digest in context.request.data_digests.items()],
        ),
        _table(
            f"## Data and licences\n\nPretraining text (`{settings.corpus.spec}`: {corpus.description}). The licence "
            "of the weights is that of a work made from these texts; nothing here decides what that means for you. "
            "Questions with worked answers and the tasks of reinforcement learning come from this project's own "
            "generators (Apache-2.0).",
            ["source", "package", "domain", "licence"],
            [[s.name, _package(s), s.domain, s.licence] for s in corpus.sources],
        ),
        "## What differs from the training framework",
        files.rotary_note(model, rotary_base),
        "A program that reads the weights without these settings, or applies rope_theta to the whole head, computes "
        "something else.",
        f"Checked before this folder was written to its place: loaded with transformers {version('transformers')} from "
        f"these files alone and run beside the training model (Megatron-core {version('megatron-core')}), both in "
        f"float32, on {found.tokens} held-out tokens. Largest difference of any log-probability over the whole "
        f"vocabulary: {found.prefill:.2e} for the sequence at once, {found.decode:.2e} token by token with the cache. "
        f"A greedy answer through the chat template chose the training model's first choice everywhere, up to "
        f"{found.greedy:.2e}. Allowed: {settings.export.tolerance:g}. What remains is the order of summation and the "
        "factor of the decay rates, which transformers divides by (layers - 1 + 1e-5) instead of (layers - 1).",
        "## Known limits of transformers with this model",
        "- It reports decay tables (`slope_rate`, `query_decay`, `key_decay`, `diagonal_decay`) as missing: they are "
        "computed, not stored.\n"
        "- Loaded in bfloat16 it rounds those tables, the router and the LM head too: log-probabilities then differ "
        "visibly. Load it in float32 where they matter.\n"
        "- Called step by step without `generate`, it takes every new token to be at position 0, because its cache "
        "asks a lightning layer for the length: pass `position_ids`. `generate` does.\n"
        "- Batches of prompts of different length decode wrongly when padded on the left, for the same reason: "
        "generate for one prompt at a time, or for prompts of equal length.",
    ]
    return "\n\n".join(parts) + "\n"


def _stage_row(run: Path) -> list[str]:
    result = load_result(run)
    if result is None:
        return [run.parent.name, f"`{run.name}`", "no longer there", "", ""]
    return [
        result.stage,
        f"`{result.fingerprint[:16]}`",
        result.key_metric,
        _number(result.before),
        _number(result.after),
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _package(source: Any) -> str:
    """Where a source comes from, by whatever its kind is named."""
    if source.kind == "hub":
        return f"{source.dataset} {source.revision or ''}".strip()
    return str(source.path) if source.kind == "local" else f"{source.package} {source.version}"


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return title + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
