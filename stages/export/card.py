"""The model card: what was exported, from which runs and data, and how it was checked."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from m1.config.corpus import Corpus
from m1.config.export import Export
from m1.data import corpus_spec
from m1.formats.layouts import MINIMAX_M1
from m1.planning import arithmetic
from m1.run.contract import StageContext, load_result
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
_USAGE_RELEASED = """\
Weights, names and `config.json` are laid out as MiniMax-M1 was released (`MiniMaxM1ForCausalLM`): for programs that
load that model, such as vLLM 0.9.2 to 0.23 (`vllm serve . --trust-remote-code`). transformers has no model for this
layout; `modeling_minimax_m1.py` of the released checkpoint, put beside these files and into `auto_map`, is one.
`configuration_minimax_m1.py` here is a class without code of its own, so that `config.json` can be read."""
_LIMITS = """\
- It reports decay tables (`slope_rate`, `query_decay`, `key_decay`, `diagonal_decay`) as missing: they are computed,
  not stored.
- Loaded in bfloat16 it rounds those tables, the router and the LM head too: log-probabilities then differ visibly.
  Load it in float32 where they matter.
- Called step by step without `generate`, it takes every new token to be at position 0, because its cache asks a
  lightning layer for the length: pass `position_ids`. `generate` does.
- Batches of prompts of different length decode wrongly when padded on the left, for the same reason: generate for one
  prompt at a time, or for prompts of equal length."""
_LIMITS_RELEASED = """\
- The norm of the lightning layers was trained with epsilon 1e-06, as in the released modelling file. vLLM's
  `minimax_text_01` has 1e-05 fixed in its code.
- `config.json` cannot say it: keep the recurrent state, the router and the LM head in float32."""


def render(
    context: StageContext[Export], found: Comparison | None, read_back: int, rotary_base: float, size: int
) -> str:
    """Text of `README.md`; `found` is None where log-probabilities were not compared."""
    settings = context.profile
    model, layout = settings.model, context.section.layout
    counts = arithmetic.parameters(model)
    softmax = arithmetic.softmax_layers(model)
    spec_name = settings.section("corpus", Corpus).spec
    corpus = corpus_spec.load(spec_name)
    released = layout == MINIMAX_M1
    head = "bfloat16, rounded from the float32 it was trained in" if _rounded(context.section) else "float32"
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: other\n---",
        f"# m1-{settings.name}",
        f"A reasoning model made by the MiniMax-M1 recipe (arXiv 2506.13585), profile `{settings.name}`, seed "
        f"{settings.seed}: {model.num_layers} layers ({model.num_layers - softmax} lightning, {softmax} softmax "
        f"attention), {model.num_experts} experts of which {model.moe_router_topk} are used, {counts.total:,} "
        f"parameters ({counts.active:,} active outside embedding and head), {size:,} bytes of weights "
        f"({settings.parallel.precision}; router float32; LM head {head}), vocabulary {model.vocab_size:,}.",
        "## Use",
        _USAGE_RELEASED if released else _USAGE,
        _table(
            "## How it was made",
            ["stage", "fingerprint", "metric", "before", "after"],
            [_stage_row(upstream.folder) for upstream in context.request.history],
        ),
        *_base_models(context),
        _table(
            "Data sets read by the export, with the hash that DVC recorded:",
            ["data set", "hash"],
            [[name, f"`{digest}`"] for name, digest in context.request.data_digests.items()],
        ),
        _table(
            f"## Data and licences\n\nPretraining text (`{spec_name}`: {corpus.description}). The licence "
            "of the weights is that of a work made from these texts; nothing here decides what that means for you. "
            "Questions with worked answers and the tasks of reinforcement learning come from this project's own "
            "generators (Apache-2.0).",
            ["source", "package", "domain", "licence"],
            [[s.name, _package(s), s.domain, s.licence] for s in corpus.sources],
        ),
        f"## Layout `{layout}` and its rotary convention",
        files.rotary_note(model, layout, rotary_base),
        "A program that reads the weights without these settings computes something else.",
        "## What was checked before this folder was written to its place",
        f"All {read_back:,} parameters of the training model, read back from these files one at a time: bit for bit "
        "those of the checkpoint" + (", the LM head after its rounding." if _rounded(context.section) else "."),
        _compared(found, released, context.section.tolerance),
        "## Known limits of " + ("those who read this layout" if released else "transformers with this model"),
        _LIMITS_RELEASED if released else _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _compared(found: Comparison | None, released: bool, tolerance: float) -> str:
    if found is None:
        return "Not compared: log-probabilities, which takes the model twice in one memory (`export.check: weights`)."
    reader = (
        "computed in plain torch as the released definition says (no installed package runs it)"
        if released
        else f"loaded with transformers {version('transformers')}"
    )
    trainer = f"Megatron-core {version('megatron-core')}"
    text = (
        f"From these files alone, {reader}, and run beside the training model ({trainer}), both in float32, on "
        f"{found.tokens} held-out tokens. Largest difference of any log-probability over the whole vocabulary: "
        f"{found.prefill:.2e} for the sequence at once, {found.decode:.2e} token by token with the cache. A greedy "
        f"answer through the chat template chose the training model's first choice everywhere, up to "
        f"{found.greedy:.2e}. Allowed: {tolerance:g}. What remains is the order of summation"
    )
    if released:
        return f"{text}. vLLM itself was not run."
    return (
        f"{text} and the factor of the decay rates, which transformers divides by (layers - 1 + 1e-5) instead of "
        "(layers - 1)."
    )


def _rounded(section: Export) -> bool:
    return section.head_precision == "bf16"


def _base_models(context: StageContext[Export]) -> list[str]:
    """The base models that runs of the history started from."""
    results = [load_result(upstream.folder) for upstream in context.request.history]
    bases = [base for result in results if result and (base := result.request.origin)]
    return [
        f"Training started from the base model in `{base.folder}`, SHA-256 of its configuration, index and headers "
        f"`{base.digest}`. Its licence applies too."
        for base in bases
    ]


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
