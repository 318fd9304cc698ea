"""What the stages of a scratch checkout do in the tests of pages: metrics under real names, figures, no training.

The file is copied into the checkout; every stage's own module calls it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from m1 import figures, paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.run.contract import StageContext, StageResult

NO_ENGINE = "swe: left out: no Docker engine <here> & none was asked for"
#: Stage -> name of the key metric, and its value before and after.
KEY = {
    "pretrain": ("held-out loss", 7.678432, 5.065137),
    "sft": ("held-out response loss", 7.549118, 0.215481),
    "context-extension": ("retrieval at 4096 tokens", 0.3125, 0.96875),
    "rl-40k": ("held-out pass@1", 0.280556, 0.355556),
    "rl-80k": ("held-out pass@1", 0.355556, 0.441667),
    "evaluate": ("held-out pass@1", 0.004167, 0.461806),
    "export": ("max |logprob difference|", None, 1.907349e-05),
}
SOLVED = {"pretrain": 0.004167, "sft": 0.291319, "context-extension": 0.302083, "rl-40k": 0.380903, "rl-80k": 0.461806}
SOURCES = {
    f"source-{i}": {
        "package": f"package-{i}",
        "version": f"1.{i}",
        "licence": "MIT",
        "sha256": f"{i}" * 64,
        "documents_kept": 17 + i,
    }
    for i in range(3)
}
SUMMARIES: dict[str, dict[str, Any]] = {
    "corpus": {"documents": 1240, "bytes": 6291456, "domain_shares": {"code": 0.25, "prose": 0.75}, "sources": SOURCES},
    "tokenizer": {"vocab_size": 2048, "sample": {"bytes": 1000000, "tokens": 400000, "bytes_per_token": 2.5}},
    "tokens": {"train": {"documents": 1100, "tokens": 1682091}, "heldout": {"documents": 140, "tokens": 25515}},
    "sft-data": {"train": {"rows": 980, "direct": 9}, "heldout": {"rows": 20, "direct": 0}},
    "synthesize": {"train": {"rows": 9000}, "heldout": {"rows": 360}, "notes": [NO_ENGINE], "left_out": [NO_ENGINE]},
}
STEPS = 30


def make(name: str, profile: Profile, folder: Path) -> dict[str, Any]:
    """A data stage: a file that depends on its section alone, and a summary."""
    section = profile.to_dict()[name]
    (folder / "content.json").write_text(json.dumps(section))
    return SUMMARIES[name]


def work(context: StageContext) -> StageResult:
    """Any other stage: a curve of every metric it has, and its figures; `stub.json` may let it fail or wait."""
    settings = paths.ROOT / "stub.json"
    how = json.loads(settings.read_text()).get(context.stage, {}) if settings.exists() else {}
    if "fail" in how:
        raise UsageError(how["fail"], "Mend the test.")
    metric, before, after = KEY[context.stage]
    final = {"evaluate": _evaluate, "export": _export}.get(context.stage, _train)(context, before, after)
    left_out = [NO_ENGINE] if context.stage == "rl-40k" else []
    checkpoint = context.output / "checkpoint"
    if context.rank == 0:
        checkpoint.mkdir(exist_ok=True)
    return context.finish(
        checkpoint=None if context.stage == "evaluate" else checkpoint,
        key_metric=metric,
        before=before,
        after=after,
        metrics=final,
        figures=_figures(context) if context.rank == 0 else (),
        notes=[*left_out, f"{context.stage}: a note on <what> was *unusual* & why"],
        left_out=left_out,
    )


def _train(context: StageContext, before: float | None, after: float | None) -> dict[str, float]:
    assert before is not None and after is not None
    reinforces = context.stage.startswith("rl-")
    for step in range(1, STEPS + 1):
        now = before + (after - before) * step / STEPS
        context.log_metrics(step, _reinforced(now, step) if reinforces else _supervised(now, step))
        context.progress(step, STEPS, f"{now:.3f}")
    if reinforces:
        return {"heldout/pass@1/arithmetic": after, "heldout/pass@1/mean": after, "agreement/pearson": 0.99991}
    return {"heldout/loss": after, "heldout/perplexity": math.exp(after), "train/tokens": 409600.0}


def _supervised(loss: float, step: int) -> dict[str, float]:
    logged = {
        "train/loss": loss,
        "train/grad_norm": 1 / step,
        "train/learning_rate": 1e-3 / step,
        "train/tokens_per_second": 5000.0 + step,
        "train/moe_load/00": 0.5,
        "train/moe_load_max": 1.25,
        "layers/grad_norm_00": 0.5 / step,
    }
    return logged | ({"heldout/loss": loss + 0.1} if step % 10 == 0 else {})


def _reinforced(correct: float, step: int) -> dict[str, float]:
    return {
        "rl/reward": correct - 0.2,
        "rl/correct": correct,
        "rl/response_length": 21.0 + step / 10,
        "rl/window": 48.0,
        "rl/entropy": 0.9 - step / 90,
        "rl/grad_norm": 0.4 + step / 100,
        "rl/tokens": 21504.0,
        "cispo/clip_frac_high": 0.01,
        "policy/approx_kl": 5.8e-7,
        "agreement/max_abs_difference": 1e-5,
        "time/rollout_seconds": 1.5,
        "heldout/pass@1/mean": correct,
    }


def _evaluate(context: StageContext, before: float | None, after: float | None) -> dict[str, float]:
    for number, (stage, share) in enumerate(SOLVED.items()):
        context.log_metrics(number, {f"pass@1/{stage}/mean": share, "evaluate/tokens": 61440.0})
    return {f"pass@1/{stage}/{task}": share for stage, share in SOLVED.items() for task in ("arithmetic", "mean")}


def _export(context: StageContext, before: float | None, after: float | None) -> dict[str, float]:
    assert after is not None
    return {"export/tokens": 512.0, "export/parameters": 1221120.0, "export/prefill": after}


def _figures(context: StageContext) -> list[Path]:
    """As the stages name theirs: the first figure tells most."""
    names = {"evaluate": ["pass_at_1"], "export": []}
    shown = names.get(context.stage, ["reward", "entropy"] if context.stage.startswith("rl-") else ["loss"])
    steps = [float(step) for step in range(STEPS)]
    drawn = []
    for name in shown:
        file = context.figures_dir() / f"{name}.png"
        lines = {name: (steps, [1 / (step + 1) for step in steps])}
        drawn.append(figures.curve(file, lines, f"{context.stage}: {name}", "step", name))
    return drawn
