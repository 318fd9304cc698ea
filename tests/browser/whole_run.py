"""A whole run made up: run folders and data sets as the stages leave them, with plausible numbers.

Figures are drawn by the stages' own functions where these need no model.
"""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path

import yaml

from m1 import figures
from m1.config.context_extension import ContextExtension
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.data import content
from m1.files import write_json
from m1.run import profiles, registry
from m1.run.contract import StageContext, StageResult
from m1.run.resolve import resolve
from m1.training.figures import training_figures
from stages.rl import figures as rl_figures
from tests.checkout import give_code

NO_ENGINE = "software-engineering tasks were left out: no Docker engine <answers> & none was asked for"
SOLVED = {"pretrain": 0.0, "sft": 0.29, "context-extension": 0.3, "rl-40k": 0.38, "rl-80k": 0.46}
_KEY_METRICS = {
    "pretrain": ("held-out loss", 7.678432, 5.0651),
    "sft": ("held-out response loss", 7.5491, 0.215481),
    "context-extension": ("retrieval at 4096 tokens", 0.3125, 0.96875),
    "rl-40k": ("held-out pass@1", 0.280556, 0.355556),
    "rl-80k": ("held-out pass@1", 0.355556, 0.441667),
    "evaluate": ("held-out pass@1", 0.0, 0.461806),
    "export": ("max |logprob difference|", None, 1.907349e-05),
}


def make(root: Path, name: str) -> tuple[Profile, dict[str, StageResult]]:
    """Write a run of every stage below `root`, which must be `m1.paths.ROOT`; returns its settings and results."""
    settings = profiles.parse({**profiles.load("tiny").to_dict(), "name": name}, "test")
    give_code(root)
    chance = random.Random(1)
    locked: dict[str, dict] = {}
    for data in registry.data_stages():
        _data_set(root, settings, data, locked)
    results: dict[str, StageResult] = {}
    parent: Path | None = None
    for trained in (entry for entry in settings.order if entry not in registry.data_stages()):
        request = resolve(trained, settings, lambda need: None, parent=parent)
        results[trained] = _run(StageContext(request), chance)
        if trained not in ("evaluate", "export"):
            parent = request.run
    return settings, results


def _data_set(root: Path, settings: Profile, name: str, locked: dict[str, dict]) -> None:
    folder = f"data/{settings.name}/{name}"
    summaries: dict[str, dict] = {
        "corpus": {
            "documents": 1240,
            "bytes": 6291456,
            "sources": {
                f"source-{i}": {
                    "package": f"package-{i}",
                    "version": f"1.{i}.0",
                    "licence": ("MIT", "BSD-3-Clause", "Apache-2.0")[i % 3],
                    "domain": "code" if i % 2 else "prose",
                    "documents_kept": 17 * (i + 1),
                    "bytes_kept": 83074 * (i + 1),
                    "sha256": hashlib.sha256(bytes([i])).hexdigest(),
                }
                for i in range(6)
            },
        },
        "tokens": {"train": {"documents": 1100, "tokens": 1682091}, "heldout": {"documents": 140, "tokens": 25515}},
        "synthesize": {"train": {"rows": 9000}, "notes": [NO_ENGINE], "left_out": [NO_ENGINE]},
    }
    (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / folder / "summary.json", summaries.get(name, {"name": name, "rows": 1200}))
    locked[f"{name}@{settings.name}"] = {
        "cmd": f"python -m stages.{name} --profile {settings.name}",
        "deps": [
            {"path": f"data/{settings.name}/{read}", "md5": locked[f"{read}@{settings.name}"]["outs"][0]["md5"]}
            for read in registry.stage(name).reads
        ],
        "outs": [{"path": folder, "md5": content.digest_of(root / folder)}],
    }
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": locked}))


def _run(context: StageContext, chance: random.Random) -> StageResult:
    """Log the metrics of one stage, draw its figures and finish it."""
    name = context.stage
    metric, before, after = _KEY_METRICS[name]
    drawn: list[Path] = []
    metrics: dict[str, float] = {}
    if name in ("pretrain", "sft", "context-extension"):
        drawn = _supervised(context, chance, 7.6 if name != "context-extension" else 1.6, after or 1.0)
        metrics = {"heldout/loss": after or 0.0, "heldout/perplexity": math.exp(after or 0.0), "train/tokens": 409600.0}
    elif name.startswith("rl-"):
        drawn, metrics = _reinforcement(context, chance, before or 0.0, after or 0.0)
    elif name == "evaluate":
        drawn, metrics = _evaluation(context, chance)
    else:
        metrics = {"export/tokens": 512.0, "export/parameters": 1221120.0, "export/greedy": 0.0}
    left_out = [NO_ENGINE] if name in ("rl-40k", "evaluate") else []
    (context.output / "checkpoint").mkdir(exist_ok=True)
    return context.finish(
        checkpoint=context.output / "checkpoint" if name not in ("evaluate", "export") else None,
        key_metric=metric,
        before=before,
        after=after,
        metrics=metrics,
        figures=drawn,
        notes=[*left_out, f"{name}: a note on <what> was unusual & why"],
        left_out=left_out,
    )


def _supervised(context: StageContext, chance: random.Random, high: float, low: float) -> list[Path]:
    steps, layers = 100, context.profile.model.num_layers
    for step in range(steps):
        loss = low + (high - low) * math.exp(-5 * step / steps)
        logged = {
            "train/loss": loss + chance.gauss(0, 0.03),
            "train/grad_norm": 0.4 + 3 * chance.random() * loss / high,
        }
        logged["train/tokens_seen"] = 4096.0 * (step + 1)
        logged |= {f"layers/grad_norm_{i:02d}": (0.1 + loss / high) / (i + 1) for i in range(layers)}
        if step % 25 == 0:
            logged["heldout/loss"] = loss + 0.1
        context.log_metrics(step, logged)
    drawn = training_figures(context)
    if context.stage == "context-extension":
        folder = context.figures_dir()
        parts = context.profile.section("context-extension", ContextExtension).stages
        names = ["before", *(f"after {part.sequence_length}" for part in parts)]
        positions = [32.0 * 2**i for i in range(8)]
        losses = {name: (positions, [5 - 0.2 * i - 0.1 * k for i in range(8)]) for k, name in enumerate(names)}
        norms = {f"layer {i}": context.series(f"layers/grad_norm_{i:02d}") for i in range(layers)}
        drawn.append(figures.position_curve(folder / "loss_by_position.png", losses, trained_length=512))
        title = "context-extension: gradient norm by layer"
        drawn.append(figures.curve(folder / "gradient_norm_by_layer.png", norms, title, "step", "norm", log=True))
    return drawn


def _reinforcement(
    context: StageContext, chance: random.Random, before: float, after: float
) -> tuple[list[Path], dict[str, float]]:
    for step in range(1, 43):
        correct = before + (after - before) * step / 42 + chance.gauss(0, 0.02)
        logged = {"rl/reward": correct - 0.2, "rl/correct": correct, "rl/response_length": 21 + chance.random()}
        logged |= {"rl/response_length_p99": 44 + 4 * chance.random(), "rl/window": 48.0, "rl/tokens": 21504.0}
        logged |= {"rl/grad_norm": 0.4 + chance.random(), "rl/entropy": 0.9 - step / 90}
        logged |= {"agreement/mean_abs_difference": 1e-7 * (1 + chance.random())}
        logged |= {"agreement/max_abs_difference": 1e-5 * (1 + chance.random())}
        if step % 6 == 0:
            logged["heldout/pass@1/mean"] = correct
        context.log_metrics(step, logged)
    tasks = [*context.profile.section("synthesize", Synthesize).tasks, "mean"]
    rates = {task: min(1.0, max(0.0, chance.gauss(before, 0.1))) for task in tasks}
    better = {task: min(1.0, rate + after - before) for task, rate in rates.items()}
    agreeing = [chance.random() for _ in range(400)]
    drawn = rl_figures.draw(context, rates, better, (agreeing, [p + chance.gauss(0, 1e-4) for p in agreeing]))
    final = {f"heldout/pass@1/{task}": rate for task, rate in better.items()}
    return drawn, final | {"rl/tokens": 21504.0, "agreement/pearson": 0.9999, "policy/approx_kl": 5.8e-7}


def _evaluation(context: StageContext, chance: random.Random) -> tuple[list[Path], dict[str, float]]:
    tasks = list(context.profile.section("synthesize", Synthesize).tasks)
    table = {
        name: {task: min(1.0, max(0.0, chance.gauss(rate, 0.12))) if rate else 0.0 for task in tasks}
        for name, rate in SOLVED.items()
    }
    for number, (name, row) in enumerate(table.items()):
        row["mean"] = sum(row.values()) / len(row)
        rates = {f"pass@1/{name}/{task}": rate for task, rate in row.items()}
        context.log_metrics(number, {**rates, "evaluate/tokens": 61440.0})
    shown = [*tasks, "mean"]
    rates = {name: [row[task] for task in shown] for name, row in table.items()}
    file = context.figures_dir() / "pass_at_1.png"
    title = "Held-out accuracy by task and checkpoint"
    final = {f"pass@1/{name}/{task}": rate for name, row in table.items() for task, rate in row.items()}
    return [figures.bars_by_group(file, shown, rates, title, "pass@1")], final
