"""Evaluate every checkpoint from the one before SFT to the last, on held-out prompts (MiniMax-M1 report §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from infra.tools import Tools
from m1.config.evaluate import Evaluate
from m1.config.families import PLAIN
from m1.errors import UsageError
from m1.files import write_json, write_rows
from m1.rollout.engine import RolloutEngine, Sampling
from m1.rollout.recurrent import RecurrentEngine
from m1.run.contract import StageContext, StageResult, Upstream, checkpoint_of
from m1.tasks.asking import Asked, Pool, opened
from m1.tasks.families import demands
from m1.tasks.pass_rate import MEAN, Answered, accuracy_by_task, evaluate_prompts
from m1.tokenizer import Tokenizer, load_tokenizer
from m1.training import checkpoint, loop, parallel
from stages.evaluate import figures
from stages.evaluate.tables import Tables, as_json, final_metrics, sentences

#: Prompts per task whose responses are written out for reading.
SHOWN = 3


def run(context: StageContext[Evaluate]) -> StageResult:
    """pass@1 by family, task and checkpoint: a JSON file and a figure for each family, and `samples/` to read."""
    loop.start(context)
    tokenizer = load_tokenizer(context.data["tokenizer"])
    families = {name: part.prompts for name, part in context.section.asked().items()}
    with opened(context, "heldout", tokenizer, families, demands(context.profile, families), Tools()) as asked:
        result = _evaluate(context, tokenizer, asked)
    parallel.shutdown()
    return result


def _evaluate(context: StageContext[Evaluate], tokenizer: Tokenizer, asked: Asked) -> StageResult:
    chosen = checkpoints_to_evaluate(context.request.history)
    tables: dict[str, Tables] = {name: {} for name in asked.pools}
    for number, upstream in enumerate(chosen):
        context.progress(number, len(chosen), upstream.stage)
        model = checkpoint.load_model(checkpoint_of(upstream.folder), context.profile.model, context.profile.parallel)
        engine = RecurrentEngine(model, tokenizer.eos_id)
        before_sft = number == 0 and any(later.stage == "sft" for later in chosen[1:])
        values = {"evaluate/tokens": 0.0}
        for pool in asked.pools.values():
            answered = _ask(context, engine, tokenizer, pool, few=before_sft)
            table = tables[pool.family][upstream.stage] = accuracy_by_task(answered)
            values |= final_metrics(pool.family, {upstream.stage: table}, errors=False)
            values |= _length(pool.family, upstream.stage, answered)
            values["evaluate/tokens"] += _tokens_of(pool, answered)
            if context.rank == 0:
                write_samples(context.output / "samples" / _samples_file(pool.family, upstream.stage), answered)
        context.log_metrics(number, values)
    context.progress(len(chosen), len(chosen))
    return _finish(context, asked, tables)


def _ask(
    context: StageContext[Evaluate], engine: RolloutEngine, tokenizer: Tokenizer, pool: Pool, *, few: bool
) -> list[Answered]:
    """Responses of one checkpoint to one family; `few` asks as little as the section wants of one before SFT."""
    section = context.section
    part = section.asked()[pool.family]
    return evaluate_prompts(
        engine,
        tokenizer,
        pool,
        pool.limited(part.before_sft if few else part.per_task),
        Sampling(part.max_new_tokens, section.temperature, section.top_p),
        samples=part.samples,
        seed=f"{context.profile.seed}/evaluate",
    )


def _tokens_of(pool: Pool, answered: Sequence[Answered]) -> float:
    """Tokens generated, and tokens of the prompts read for them."""
    lengths = {prompt.row.id: len(prompt.tokens) for prompt in pool.prompts}
    return float(sum(item.tokens + lengths[item.row.id] * len(item.rollouts) for item in answered))


def _length(family: str, stage: str, answered: Sequence[Answered]) -> dict[str, float]:
    name = "response_length" if family == PLAIN else f"{family}/response_length"
    return {f"{name}/{stage}": sum(item.tokens for item in answered) / sum(len(item.rollouts) for item in answered)}


def _samples_file(family: str, stage: str) -> str:
    return f"{stage}.jsonl" if family == PLAIN else f"{family}-{stage}.jsonl"


def _finish(context: StageContext[Evaluate], asked: Asked, tables: Mapping[str, Tables]) -> StageResult:
    drawn: list[Path] = []
    if context.rank == 0:
        for family, table in tables.items():
            write_json(context.output / _file(family), as_json(table))
            drawn.append(figures.draw(context, family, table))
    means = [row[MEAN].value for row in tables[PLAIN].values()]
    metrics = {name: value for family, table in tables.items() for name, value in final_metrics(family, table).items()}
    return context.finish(
        checkpoint=None,
        key_metric="held-out pass@1",
        before=means[0],
        after=means[-1],
        metrics=metrics,
        figures=drawn,
        notes=[
            *sentences(PLAIN, tables[PLAIN]),
            *asked.notes,
            *(text for family, table in tables.items() if family != PLAIN for text in sentences(family, table)),
        ],
        left_out=asked.left_out,
    )


def _file(family: str) -> str:
    return "pass_at_1.json" if family == PLAIN else f"{family}.json"


def checkpoints_to_evaluate(history: Sequence[Upstream]) -> Sequence[Upstream]:
    """From the checkpoint that SFT started from (or the first, without SFT) to the newest."""
    if not history:
        raise UsageError("evaluate: no training run upstream", "Train something first.")
    stages = [upstream.stage for upstream in history]
    return history[max(0, stages.index("sft") - 1) :] if "sft" in stages else history


def write_samples(file: Path, answered: Sequence[Answered]) -> None:
    """All responses to the first prompts of every task, one JSON object per prompt; correct is null if not judged."""
    shown: dict[str, int] = {}
    lines = []
    for item in answered:
        row = item.row
        shown[row.task] = shown.get(row.task, 0) + 1
        if shown[row.task] > SHOWN:
            continue
        responses = [
            {
                "response": text,
                "correct": verdict.correct if verdict.judged else None,
                "tokens": len(rollout.tokens),
                "finish": rollout.finish_reason,
                **({"end": verdict.end} if verdict.end else {}),
            }
            for text, verdict, rollout in zip(item.texts, item.verdicts, item.rollouts, strict=True)
        ]
        line = {"task": row.task, "id": row.id, "prompt": row.question, "expected": row.answer}
        lines.append({**line, "responses": responses})
    write_rows(file, lines)
