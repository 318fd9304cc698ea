"""Evaluate every checkpoint from the one before SFT to the last, on held-out prompts (MiniMax-M1 report §6)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from m1 import figures
from m1.errors import UsageError
from m1.model.decoder import Decoder
from m1.stage import StageContext, StageResult, checkpoint_of, write_json
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training import checkpoint, loop, parallel
from stages.evaluate import swe_report
from stages.evaluate.pass_rate import Accuracy, Answered, accuracy_by_task, evaluate_prompts
from stages.evaluate.prompts import first_of_each_task, open_swe, read_prompts
from stages.evaluate.swe_report import Resolved

if TYPE_CHECKING:
    from stages.evaluate.swe import Answered as SweAnswered
    from stages.evaluate.swe import Swe

#: Prompts per task whose responses are written out for reading.
SHOWN = 3


def run(context: StageContext) -> StageResult:
    """pass@1 by task and checkpoint: `pass_at_1.json`, a figure, and `samples/<stage>.jsonl` to read.

    Where the profile asks for software-engineering tasks, `swe.json`, a figure and `samples/swe-<stage>.jsonl` as well:
    the share resolved, by kind of task, of the packages that nothing was trained on.
    """
    loop.start(context)
    tokenizer = load_tokenizer(context.data["tokenizer"])
    with open_swe(context, "heldout", tokenizer) as (swe, said):
        result = _evaluate(context, tokenizer, swe, said)
    parallel.shutdown()
    return result


def _evaluate(context: StageContext, tokenizer: Tokenizer, swe: Swe | None, said: list[str]) -> StageResult:
    settings, section = context.profile, context.section
    prompts = first_of_each_task(
        read_prompts(context.data["synthesize"] / "heldout.jsonl", tokenizer), section.prompts_per_task
    )
    chosen = checkpoints_to_evaluate(context.request.history)
    table: dict[str, dict[str, Accuracy]] = {}
    resolved: dict[str, dict[str, Resolved]] = {}
    for number, (stage, folder) in enumerate(chosen):
        context.progress(number, len(chosen), stage)
        model = checkpoint.load_model(checkpoint_of(Path(folder)), settings.model, settings.parallel)
        few = section.prompts_per_task_before_sft
        before_sft = number == 0 and any(name == "sft" for name, _ in chosen[1:])
        asked = first_of_each_task(prompts, few) if before_sft and few is not None else prompts
        decoder = Decoder(model)
        answered = evaluate_prompts(
            decoder,
            tokenizer,
            asked,
            samples=section.samples_per_prompt,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            top_p=section.top_p,
            seed=f"{settings.seed}/evaluate",
        )
        table[stage] = accuracy_by_task(answered)
        values = {f"pass@1/{stage}/{task}": entry.value for task, entry in table[stage].items()}
        lengths = [len(rollout.tokens) for item in answered for rollout in item.rollouts]
        values[f"response_length/{stage}"] = sum(lengths) / len(lengths)
        read = sum(len(prompt.tokens) for prompt in asked) * section.samples_per_prompt
        values["evaluate/tokens"] = float(sum(lengths) + read)
        if swe is not None:
            limit = min(section.swe.tasks_per_kind, few) if before_sft and few else section.swe.tasks_per_kind
            tasks = first_of_each_task(swe.prompts, limit)
            solved = swe.evaluate(
                decoder,
                tokenizer,
                tasks,
                samples=section.swe.samples_per_task,
                max_new_tokens=section.swe.max_new_tokens or section.max_new_tokens,
                temperature=section.temperature,
                top_p=section.top_p,
                seed=f"{settings.seed}/evaluate",
            )
            resolved[stage] = swe_report.resolved_by_kind(solved)
            values |= swe_report.metrics(stage, resolved[stage])
            sampled = sum(len(rollout.tokens) for item in solved for rollout in item.rollouts)
            read = sum(len(prompt.tokens) for prompt in tasks) * section.swe.samples_per_task
            values["evaluate/tokens"] += sampled + read
            if context.rank == 0:
                write_samples(context.output / "samples" / f"swe-{stage}.jsonl", solved)
        context.log_metrics(number, values)
        if context.rank == 0:
            write_samples(context.output / "samples" / f"{stage}.jsonl", answered)
    context.progress(len(chosen), len(chosen))
    means = [table[stage]["mean"].value for stage, _ in chosen]
    final = {f"pass@1/{stage}/{task}": entry.value for stage, row in table.items() for task, entry in row.items()}
    final |= {f"pass@1_error/{stage}": row["mean"].standard_error for stage, row in table.items()}
    for stage, kinds in resolved.items():
        final |= swe_report.metrics(stage, kinds)
    drawn = []
    if context.rank == 0:
        write_json(context.output / "pass_at_1.json", _plain(table))
        tasks = list(table[chosen[0][0]])
        series = {stage: [row[task].value for task in tasks] for stage, row in table.items()}
        file = context.figures_dir() / "pass_at_1.png"
        drawn = [figures.bars_by_group(file, tasks, series, "Held-out accuracy by task and checkpoint", "pass@1")]
        if section.swe is not None:
            drawn += swe_report.write(context, resolved, said)
    return context.finish(
        checkpoint=None,
        key_metric="held-out pass@1",
        before=means[0],
        after=means[-1],
        metrics=final,
        figures=drawn,
        notes=[
            f"{stage}: pass@1 {row['mean'].value:.3f}, 95% interval "
            f"{row['mean'].interval[0]:.3f} to {row['mean'].interval[1]:.3f}"
            for stage, row in table.items()
        ]
        + said
        + [swe_report.sentence(stage, kinds) for stage, kinds in resolved.items()],
        left_out=[] if swe else said,
    )


def checkpoints_to_evaluate(history: list[list[str]]) -> list[list[str]]:
    """From the checkpoint that SFT started from (or the first, without SFT) to the newest, as [stage, run folder]."""
    if not history:
        raise UsageError("evaluate: no training run upstream", "Train something first.")
    stages = [stage for stage, _ in history]
    return history[max(0, stages.index("sft") - 1) :] if "sft" in stages else history


def write_samples(file: Path, answered: Sequence[Answered] | Sequence[SweAnswered]) -> None:
    """All responses to the first prompts of every task, one JSON object per prompt; correct is null if not judged."""
    shown: dict[str, int] = {}
    lines = []
    for item in answered:
        task = item.row["task"]
        shown[task] = shown.get(task, 0) + 1
        if shown[task] <= SHOWN:
            responses = [
                {"response": text, "correct": correct, "tokens": len(rollout.tokens), "finish": rollout.finish_reason}
                for text, correct, rollout in zip(item.texts, item.correct, item.rollouts, strict=True)
            ]
            line = {"task": task, "id": item.row["id"], "prompt": item.row["question"], "expected": item.row["answer"]}
            lines.append(json.dumps({**line, "responses": responses}))
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text("\n".join(lines) + "\n")
    os.replace(unfinished, file)


def _plain(table: dict[str, dict[str, Accuracy]]) -> dict[str, dict[str, dict[str, float | list[float]]]]:
    return {
        stage: {
            task: {
                "pass@1": entry.value,
                "standard_error": entry.standard_error,
                "interval_95": list(entry.interval),
                "prompts": entry.prompts,
            }
            for task, entry in row.items()
        }
        for stage, row in table.items()
    }
