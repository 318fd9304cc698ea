"""`m1 plan`: what a run would do, what it needs and costs, and which layouts fit. Nothing is started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from flows import plan as planning
from infra import tools
from m1 import paths
from m1.cli.tables import plan_table, short, table
from m1.config.parallel import Parallel
from m1.config.profile import Profile
from m1.config.rl import Rl
from m1.errors import UsageError
from m1.planning import decoding, layouts, memory, preflight, work
from m1.planning.arithmetic import checkpoint_bytes, parameters
from m1.planning.layouts import Candidate, Hardware
from m1.planning.work import Price
from m1.run.stage import Steps

#: Runs above this many GPU hours show what they cost without being asked.
_COSTLY = 1.0
_SHOWN_LAYOUTS = 10


def summary(settings: Profile, rows: list[planning.Row], price: Price, hardware: Hardware) -> dict[str, Any]:
    """The whole plan as plain values."""
    counts = parameters(settings.model)
    stages = []
    for row in rows:
        cost = row.cost
        hours = price.of(cost) if cost else None
        stages.append(
            {
                "stage": row.stage,
                "action": row.action,
                "reason": row.reason,
                "inputs": list(row.inputs),
                "tokens": cost.tokens if cost else None,
                "tokens_are_a_bound": bool(cost and cost.bound),
                "flops": cost.flops if cost else None,
                "gpu_hours": hours,
                "dollars": None if hours is None else hours * price.dollars,
            }
        )
    return {
        "profile": settings.name,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "checkpoint_bytes": checkpoint_bytes(settings.model),
        "assumptions": {**asdict(price), "gpu_memory": hardware.memory, "memory_reserve": memory.RESERVE},
        "stages": stages,
        "refused": preflight.refusals(settings, [row.stage for row in rows], hardware.memory),
        "unmet": [str(error) for error in preflight.unmet(settings, _to_run(rows), tools.missing)],
        "layout": settings.parallel.model_dump(),
        "memory": [_memory_row(settings, each, hardware) for each in work.training_steps(settings)],
        "reinforcement_learning": _rl(settings, price),
        "decoding": [_convention(convention) for convention in decoding.conventions(settings.model)],
    }


def _to_run(rows: list[planning.Row]) -> list[str]:
    return [row.stage for row in rows if row.action == "run"]


def _memory_row(settings: Profile, each: Steps, hardware: Hardware) -> dict[str, Any]:
    load = work.load(each, settings.parallel)
    stage, needed = memory.largest(settings.model, settings.parallel, load)
    fits = needed.total <= hardware.memory * (1 - memory.RESERVE)
    return {"stage": each.name, **asdict(load), "pipeline_stage": stage, **_bytes(needed), "fits": fits}


def _bytes(needed: memory.Memory) -> dict[str, float]:
    return {**asdict(needed), "total": needed.total}


def _rl(settings: Profile, price: Price) -> dict[str, Any]:
    """The published cost beside this project's estimates."""
    published = {"gpu_hours": work.PAPER_RL_GPU_HOURS, "dollars": work.PAPER_RL_DOLLARS}
    found: dict[str, Any] = {"published": {"what": "512 H800 for three weeks (M1 report, abstract)", **published}}
    parts = [part for name in settings.order if (part := settings.find(name, Rl)) is not None]
    for name, length in (("windows filled", None), ("mean response 20,000 tokens", work.PAPER_RESPONSE_TOKENS)):
        costs = [work.rl_cost(settings.model, part, length) for part in parts]
        hours = sum(price.of(cost) for cost in costs)
        totals = {"tokens": sum(cost.tokens for cost in costs), "flops": sum(cost.flops for cost in costs)}
        found[name] = {**totals, "gpu_hours": hours, "dollars": hours * price.dollars}
    return found


def _convention(convention: decoding.Convention) -> dict[str, Any]:
    ratios = {name: convention.ratio(length) for name, length in decoding.LENGTHS.items()}
    return {
        "convention": convention.name,
        "explanation": convention.explanation,
        "ours": asdict(convention.ours),
        "deepseek_r1": asdict(convention.peer),
        "last_token_only": convention.per_token,
        "ratio": ratios,
    }


def is_costly(plan: dict[str, Any]) -> bool:
    """Whether the run is large enough for its cost to matter."""
    return sum(stage["gpu_hours"] or 0.0 for stage in plan["stages"]) > _COSTLY


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(settings: Profile, rows: list[planning.Row], plan: dict[str, Any], cost: bool) -> Group:
    """The plan for people."""
    parts: list[RenderableType] = [plan_table(settings, rows)]
    if plan["memory"]:
        parts += ["", _memory_table(settings, plan)]
    if cost:
        parts += ["", _cost_table(plan), "", _rl_table(plan), "", _decoding_table(plan)]
    return Group(*parts)


def _memory_table(settings: Profile, plan: dict[str, Any]) -> Group:
    limit = plan["assumptions"]["gpu_memory"]
    columns = ["stage", "sequence", "micro", "of PP", *PARTS.values(), "total", "fits"]
    made = table(f"memory of the fullest rank, {layout_text(settings.parallel)}", *columns, right=columns[1:])
    for row in plan["memory"]:
        micro = f"{row['micro_batches']} x {row['micro_batch_size']}"
        cells = [row["stage"], f"{row['sequence_length']:,}", micro, str(row["pipeline_stage"] + 1)]
        cells += [gigabytes(row[part]) for part in (*PARTS, "total")]
        made.add_row(*cells, "yes" if row["fits"] else "[red]no[/red]")
    used = limit * (1 - memory.RESERVE)
    note = f"GB (10^9 bytes); fits: at most {used / 1e9:.3g} of {limit / 1e9:.3g} GB, the rest is reserve"
    return Group(made, f"[dim]{note}[/dim]")


def _cost_table(plan: dict[str, Any]) -> Group:
    assumed = plan["assumptions"]
    columns = ["stage", "tokens", "FLOPs", "GPU hours", "dollars"]
    made = table("cost", *columns, right=columns[1:])
    for row in (row for row in plan["stages"] if row["flops"] is not None):
        mark = "≤ " if row["tokens_are_a_bound"] else ""
        cells = [f"{mark}{short(row['tokens'])}", f"{mark}{row['flops']:.2e}", f"{mark}{amount(row['gpu_hours'])}"]
        made.add_row(row["stage"], *cells, f"{mark}{amount(row['dollars'])}")
    made.add_section()
    total = {
        name: sum(row[name] or 0 for row in plan["stages"]) for name in ("tokens", "flops", "gpu_hours", "dollars")
    }
    cells = [f"{total['flops']:.2e}", amount(total["gpu_hours"]), amount(total["dollars"])]
    made.add_row("together", short(total["tokens"]), *cells)
    note = (
        f"{assumed['peak_flops'] / 1e12:.4g} TFLOP/s a GPU, MFU {assumed['mfu']:.2g} in training and "
        f"{assumed['rollout_mfu']:.2g} in generation, {assumed['dollars']:.2f} dollars a GPU hour"
    )
    return Group(made, f"[dim]{note}[/dim]")


def _rl_table(plan: dict[str, Any]) -> Table:
    columns = ["reinforcement learning", "tokens", "FLOPs", "GPU hours", "dollars"]
    made = table(None, *columns, right=columns[1:])
    for name, row in plan["reinforcement_learning"].items():
        tokens = short(row["tokens"]) if "tokens" in row else "-"
        flops = f"{row['flops']:.2e}" if "flops" in row else "-"
        label = row["what"] if name == "published" else f"this plan, {name}"
        made.add_row(label, tokens, flops, amount(row["gpu_hours"]), amount(row["dollars"]))
    return made


def _decoding_table(plan: dict[str, Any]) -> Group:
    lengths = list(decoding.LENGTHS)
    made = table(
        f"operations to generate: {plan['profile']} as a share of DeepSeek-R1", "convention", "counted", *lengths,
        right=lengths,
    )  # fmt: skip
    for row in plan["decoding"]:
        made.add_row(row["convention"], row["explanation"], *(f"{row['ratio'][name]:.1%}" for name in lengths))
    return Group(made, "[dim]report §1: under 50% at 64K, about 25% at 100K; its formula is not published[/dim]")


PARTS = {
    "parameters": "weights",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "logits": "logits",
}


def layout_text(parallel: Parallel) -> str:
    """A layout in the field's own letters."""
    named = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VP": parallel.virtual_pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
        "DP": parallel.data_parallel_size,
    }
    sizes = " ".join(f"{name}{size}" for name, size in named.items())
    recompute = "full recomputation" if parallel.recompute == "full" else "no recomputation"
    ranks = "1 rank" if parallel.world_size == 1 else f"{parallel.world_size} ranks"
    return f"{ranks}: {sizes}, {parallel.precision}, {recompute}"


def amount(value: float) -> str:
    """Hours or dollars: whole ones, and two digits of less than ten."""
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def gigabytes(count: float) -> str:
    """Three digits of 10^9 bytes."""
    return f"{count / 1e9:.3g}" if count < 1e12 else f"{count / 1e9:,.0f}"


# --- layouts --------------------------------------------------------------------------------------------------------


def find_work(settings: Profile, stage: str | None) -> Steps:
    """The training work that `--stage` names, by default the first of the order.

    Raises:
        UsageError: no training stage of the profile has that name.
    """
    every = work.training_steps(settings)
    found = next((each for each in every if stage in (None, each.name)), None)
    if found is None:
        raise UsageError(
            f"stage={stage!r} is not training work of profile {settings.name}",
            f"Choose from: {', '.join(each.name for each in every)}.",
        )
    return found


def layout_summary(settings: Profile, each: Steps, gpus: int, hardware: Hardware) -> dict[str, Any]:
    """The fastest layouts that fit, and where none does, the smallest cluster with one, as plain values."""
    precision = settings.parallel.precision
    found = layouts.search(settings.model, each, gpus, hardware, precision=precision)
    smallest = None
    if not found:
        smallest = layouts.smallest_cluster(settings.model, each, hardware, precision=precision)
    return {
        "profile": settings.name,
        "work": asdict(each),
        "gpus": gpus,
        "hardware": asdict(hardware),
        "fitting": len(found),
        "smallest_gpus": smallest,
        "layouts": [_candidate(candidate) for candidate in found[:_SHOWN_LAYOUTS]],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    time = candidate.time
    return {
        "parallel": candidate.parallel.model_dump() | {"data_parallel_size": candidate.parallel.data_parallel_size},
        "load": asdict(candidate.load),
        "pipeline_stage": candidate.fullest,
        "memory": _bytes(candidate.memory),
        "seconds": {**asdict(time), "total": time.total},
        "mfu": candidate.mfu,
    }


def layout_tables(found: dict[str, Any]) -> Group:
    """The search for people, a hundred columns wide."""
    each, hardware = found["work"], found["hardware"]
    what = f"{each['name']}, sequence {each['sequence_length']:,}, batch {each['global_batch_size']:,}"
    room = f"{found['gpus']} GPUs of {hardware['memory'] / 1e9:.3g} GB"
    if not found["layouts"]:
        smallest = found["smallest_gpus"]
        hope = f"The smallest number that would: {smallest}." if smallest else "No number up to 16,384 would."
        return Group(f"{found['profile']}, {what}: no layout fits {room}. {hope}")
    sizes = ["TP", "PP", "VP", "CP", "EP", "ETP", "DP", "mb"]
    columns = [*sizes, "rec", "s/step", "MFU", "bub", "comm", *PARTS.values(), "GB"]
    title = f"{found['profile']}, {what}: {found['fitting']:,} layouts fit {room}; the fastest by estimate"
    made = table(title, *columns, right=columns)
    made.padding = (0, 1, 0, 0)
    for row in found["layouts"]:
        parallel, seconds = row["parallel"], row["seconds"]
        cells = [str(parallel[name]) for name in _SIZE_FIELDS] + [str(row["load"]["micro_batch_size"])]
        communication = sum(seconds[name] for name in ("tensor", "expert", "context", "pipeline", "data"))
        cells += ["full" if parallel["recompute"] == "full" else "no", f"{seconds['total']:.3g}", f"{row['mfu']:.0%}"]
        cells += [f"{seconds['bubble'] / seconds['total']:.0%}", f"{communication / seconds['total']:.0%}"]
        made.add_row(*cells, *(gigabytes(row["memory"][part]) for part in (*PARTS, "total")))
    note = (
        "mb sequences of a micro-batch; rec recomputation; bub, comm pipeline bubble and communication as a share of "
        "the step; memory of the fullest rank in GB. Times are estimates: docs/planning.md."
    )
    return Group(made, f"[dim]{note}[/dim]")


_SIZE_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "data_parallel_size",
)


def figure(settings: Profile, path: Path | None) -> Path:
    """Draw the operations per generated token; by default beside the profile's runs."""
    target = path or paths.runs_dir(settings.name, "plan") / "decode-flops.png"
    return decoding.figure(settings.model, target, settings.name)
