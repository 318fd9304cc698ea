"""The report: one HTML page about the newest run of every stage, made from the run folders alone, without a server."""

from __future__ import annotations

import base64
import html
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1 import paths
from m1.config.profile import Profile
from m1.config.synthesize import Synthesize
from m1.errors import UsageError
from m1.files import write_text
from m1.run import profiles as profiles
from m1.run.contract import StageResult, load_result, newest_run
from m1.run.folder import MetricsLine, read_metrics
from m1.run.registry import data_stages
from m1.run.registry import stage as stage_record
from m1.run.stage import Cost
from m1.tracking import records

_GLOSSARY = {
    "loss": "Mean negative log-likelihood of the next token, in nats. Lower is better; a uniform guess over the "
    "vocabulary has the logarithm of its size.",
    "held out": "Text or questions that training never sees.",
    "gradient norm": "Length of the gradient over all parameters. A sudden rise announces a run that diverges.",
    "reward": "What the verifier gives an answer: right or wrong, its format, and a penalty for overlong ones.",
    "pass@1": "Probability that one sampled answer is right, estimated as the mean over several samples.",
    "CISPO": "The objective of the MiniMax-M1 report §3.1: importance weights are clipped, tokens are never dropped.",
    "fingerprint": "Hash of code, settings, data and parent. The same fingerprint means the work need not be redone.",
}
_STYLE = """
:root{color-scheme:light}body{font:15px/1.55 system-ui,sans-serif;color:#222;margin:0 auto;max-width:62rem;padding:2rem}
h1{margin-bottom:.2rem}h2{margin-top:2.6rem;border-bottom:1px solid #ddd;padding-bottom:.25rem}h3{margin:1.8rem 0 .3rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.35rem .6rem;border-bottom:1px solid #e5e5e5;
text-align:left;vertical-align:top}th{background:#f6f6f6}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code{background:#f3f3f3;padding:0 .25em;border-radius:3px;overflow-wrap:anywhere}img{max-width:100%;height:auto}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(26rem,1fr));gap:1rem}.quiet{color:#666}
.scroll{overflow-x:auto}summary{cursor:pointer;color:#0059a8}li{margin:.15rem 0}
"""


@dataclass
class _Stage:
    """What the report knows of one stage."""

    name: str
    run: Path | None
    result: StageResult | None
    lines: list[MetricsLine]
    record: records.DataRecord | None
    summary: dict[str, Any]

    @property
    def done(self) -> bool:
        return self.result is not None or self.record is not None


#: stage -> what it was expected to process.
Plan = Mapping[str, Cost]
_ADDED_TOKENS = ("rl/tokens", "evaluate/tokens")


def report(profile: Profile | str, planned: Callable[[Profile], Plan] | None = None) -> Path:
    """Write `runs/<profile>/report.html` about the newest finished run of every stage.

    Args:
        profile: or its name.
        planned: what the settings of the run plan; for the table of plan and actual.

    Returns:
        the page. It holds its figures and refers to nothing outside.

    Raises:
        UsageError: no such profile, or nothing has run yet.
    """
    settings = profiles.load(profile) if isinstance(profile, str) else profile
    stages = [_stage(settings.name, name) for name in settings.order]
    if not any(stage.done for stage in stages):
        raise UsageError(f"profile {settings.name} has no finished stage to report on", "Run `m1/full` first.")
    settings = _settings_of_run(settings, stages)
    with tempfile.TemporaryDirectory() as folder:
        body = "".join(
            [
                _head(settings, stages),
                _overview(settings, stages, Path(folder)),
                _plan(settings, stages, planned(settings) if planned else {}),
                _curves(settings, stages, Path(folder)),
                "<h2>Stage by stage</h2>",
                *(_details(stage) for stage in stages if stage.done),
                _glossary(),
            ]
        )
    title = f"m1 report: {settings.name}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
    path = paths.runs_dir(settings.name, "").resolve() / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path


def _stage(profile_name: str, name: str) -> _Stage:
    if name in data_stages():
        record = records.locked(name, profile_name)
        folder = paths.ROOT / record.path if record else None
        return _Stage(name, None, None, [], record, records.summary(folder) if folder else {})
    run = newest_run(profile_name, name)
    if run is None:
        return _Stage(name, None, None, [], None, {})
    return _Stage(name, run, load_result(run), read_metrics(run), None, {})


def _settings_of_run(settings: Profile, stages: Sequence[_Stage]) -> Profile:
    """The settings the newest run was made with; the profile's file may have changed since, or had overrides."""
    results = [stage.result for stage in stages if stage.result is not None]
    if not results:
        return settings
    newest = max(results, key=lambda result: result.finished_at)
    try:
        return profiles.parse(newest.request.profile, "the newest run")
    except UsageError:
        return settings  # made with an older form of the profile


def _head(settings: Profile, stages: Sequence[_Stage]) -> str:
    from m1.tracking.pictures import duration

    results = [stage.result for stage in stages if stage.result is not None]
    seconds = sum(result.seconds for result in results)
    finished = max((result.finished_at for result in results), default=0.0)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(finished)) if finished else "no training stage yet"
    model = settings.model
    softmax = sum(model.is_softmax_layer(index) for index in range(model.num_layers))
    done = sum(stage.done for stage in stages)
    return (
        f"<h1>Run report: profile {_text(settings.name)}</h1>"
        f'<p class="quiet">{done} of {len(stages)} stages done; the newest finished {when}; '
        f"{duration(seconds)} of work in the training, evaluation and export stages.</p>"
        "<p>This page follows one language model from raw text to a checkpoint trained with reinforcement learning, in "
        f"the order of the MiniMax-M1 recipe. The model has {model.num_layers} layers, {softmax} with softmax and "
        f"{model.num_layers - softmax} with lightning attention, {model.num_experts} experts of which each token uses "
        f"{model.moe_router_topk}, hidden size {model.hidden_size} and a vocabulary of {model.vocab_size:,}. Every box "
        "below is one stage; it starts from what the boxes before it left. Words that may be new are at the end.</p>"
    )


def _overview(settings: Profile, stages: Sequence[_Stage], folder: Path) -> str:
    from m1.tracking.pictures import duration, flow_picture

    results = {stage.name: stage.result for stage in stages if stage.result is not None}
    done = [stage.name for stage in stages if stage.done]
    picture = flow_picture(folder / "flow.png", settings.order, results, done)
    rows = []
    for number, stage in enumerate(stages, 1):
        result = stage.result
        about = f'{_text(stage.name)}<br><span class="quiet">{_text(stage_record(stage.name).about)}</span>'
        if result is not None:
            tokens = _final(result, "tokens")
            cells = [
                duration(result.seconds),
                _text(result.key_metric),
                _number(result.before),
                _number(result.after),
                _count(tokens),
            ]
        elif stage.record is not None:
            cells = ["", f"data set <code>{stage.record.digest[:12]}</code>", "", "", _count(_tokens(stage.summary))]
        else:
            cells = ["", '<span class="quiet">not done yet</span>', "", "", ""]
        rows.append([str(number), about, *cells])
    table = _table(["", "stage", "time", "key metric", "before", "after", "tokens"], rows, numeric={2, 4, 5, 6})
    return f"<h2>The flow</h2>{_image(picture, 'the stages in order')}{table}{_mixed(stages)}"


def _mixed(stages: Sequence[_Stage]) -> str:
    """A warning where the newest run of a stage was not made from the newest run of its parent."""
    newest = {stage.name: stage.run for stage in stages if stage.run is not None}
    notes = []
    for stage in stages:
        parent = stage.result.request.parent if stage.result else None
        parent_stage = stage.result.request.parent_stage if stage.result else None
        if parent and parent_stage in newest and Path(parent).name != newest[parent_stage].name:
            notes.append(
                f"The newest {_text(stage.name)} started from an earlier {_text(parent_stage)} run "
                f"(<code>{_text(Path(parent).name)}</code>), not from the newest one shown here."
            )
    return _list(notes)


def _plan(settings: Profile, stages: Sequence[_Stage], planned: Plan) -> str:
    from m1.tracking.pictures import duration

    rows = []
    for stage in stages:
        if stage.result is None:
            continue
        plan = planned.get(stage.name) or Cost(0)
        expected, tokens = plan.tokens or None, _tokens_logged(stage)
        flops = plan.flops / expected * tokens if expected and tokens is not None and plan.flops else None
        mark = "≤ " if plan.bound else ""
        steps = [
            _count(plan.steps),
            _count(max((x.step for x in stage.lines), default=None)),
        ]
        row = [_marked(mark, _count(expected)), _count(tokens), _share(tokens, expected)]
        row += [_marked(mark, _power(plan.flops or None)), _power(flops), duration(stage.result.seconds)]
        speed = tokens / stage.result.seconds if tokens and stage.result.seconds else None
        rows.append([_text(stage.name), *steps, *row, _count(speed)])
    if not rows:
        return ""
    names = ["stage", "steps planned", "last step logged", "tokens planned", "tokens", "of plan"]
    names += ["FLOPs planned", "FLOPs", "time", "tokens/s"]
    return (
        "<h2>Plan and actual</h2><p>What the profile asks for beside what was logged. Steps are optimizer steps, in "
        "reinforcement learning batches of rollouts. Tokens are what the model read, without padding; ≤ marks an upper "
        "bound, as responses and samples may be shorter than their limit. FLOPs are the logged tokens times the plan's "
        "operations for a token. Time is the stage's own, measuring and saving included. An empty cell means that "
        "nothing was planned or logged.</p>" + _table(names, rows, numeric=set(range(1, len(names))))
    )


def _tokens_logged(stage: _Stage) -> float | None:
    """Tokens that a stage read: a running count of training, or what every batch of rollouts or checkpoint added."""
    assert stage.result is not None
    counts = [line.metrics["train/tokens_seen"] for line in stage.lines if "train/tokens_seen" in line.metrics]
    if counts:
        return max(counts)
    added = [line.metrics[key] for line in stage.lines for key in _ADDED_TOKENS if key in line.metrics]
    return sum(added) if added else _final(stage.result, "tokens")


def _marked(mark: str, text: str) -> str:
    return mark + text if text else ""


def _share(value: float | None, of: float | None) -> str:
    return f"{value / of:.0%}" if value is not None and of else ""


def _curves(settings: Profile, stages: Sequence[_Stage], folder: Path) -> str:
    from m1.tracking.pictures import accuracy, spanning

    images = spanning(folder, settings.order, {stage.name: stage.lines for stage in stages})
    parts = [_image(path, name) for name, path in images.items()]
    for stage in stages:
        if stage.name == "evaluate" and stage.result is not None:
            bars = accuracy(
                folder / "accuracy.png", stage.result.metrics, list(settings.section("synthesize", Synthesize).tasks)
            )
            parts += [_image(bars, "accuracy by task")] if bars else []
    return f'<h2>Across the stages</h2><div class="figures">{"".join(parts)}</div>' if parts else ""


def _tasks(settings: Profile) -> list[str]:
    made = settings.find("synthesize", Synthesize)
    return list(made.tasks) if made else []


def _details(stage: _Stage) -> str:
    parts = [f"<h3>{_text(stage.name)}</h3><p>{_text(stage_record(stage.name).about)}</p>"]
    if stage.record is not None:
        parts.append(
            f"<p>Data set <code>{_text(stage.record.path)}</code>, DVC hash <code>{stage.record.digest}</code>, made "
            f"by <code>{_text(stage.record.command)}</code>.</p>"
        )
        if stage.record.sources:
            parts.append(_folded("Raw sources and their licences", _sources(stage.record.sources)))
        parts.append(_list([_text(note) for note in stage.summary.get("notes", [])]))
        parts.append(_values("Numbers of the data set", records.numbers(stage.summary)))
    if stage.result is not None and stage.run is not None:
        result = stage.result
        parts.append(
            f'<p class="quiet">Run folder <code>{_text(records.relative(stage.run))}</code>, fingerprint '
            f"<code>{_text(result.fingerprint[:16])}</code>.</p>{_list([_text(note) for note in result.notes])}"
        )
        images = [stage.run / figure for figure in result.figures]
        shown = "".join(_image(image, f"{stage.name}: {image.stem}") for image in images if image.is_file())
        parts.append(f'<div class="figures">{shown}</div>' if shown else "")
        parts.append(_values("All final metrics", result.metrics))
    return "".join(parts)


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    names = [
        key
        for key in (
            "name",
            "package",
            "version",
            "licence",
            "license",
            "domain",
            "documents_kept",
            "bytes_kept",
            "sha256",
        )
        if any(key in source for source in sources)
    ]
    return _table(names, [[_text(str(source.get(name, ""))) for name in names] for source in sources])


def _values(title: str, values: Mapping[str, float]) -> str:
    if not values:
        return ""
    return _folded(title, _table(["metric", "value"], [[_text(k), _number(v)] for k, v in values.items()], numeric={1}))


def _glossary() -> str:
    entries = "".join(f"<dt><b>{_text(word)}</b></dt><dd>{_text(meaning)}</dd>" for word, meaning in _GLOSSARY.items())
    return f"<h2>Words</h2><dl>{entries}</dl>"


def _tokens(summary: Mapping[str, Any]) -> float | None:
    value = summary.get("tokens")
    return float(value) if isinstance(value, (int, float)) else None


def _final(result: StageResult, name: str) -> float | None:
    """A final metric by its whole key or its last part."""
    if name in result.metrics:
        return result.metrics[name]
    return next((value for key, value in result.metrics.items() if key.endswith(f"/{name}")), None)


def _text(text: str) -> str:
    return html.escape(text)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _power(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else ""


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], numeric: set[int] | None = None) -> str:
    """A table of ready HTML cells; columns in `numeric` are set to the right."""
    mark = ['class="n"' if index in (numeric or set()) else "" for index in range(len(names))]
    head = "".join(f"<th {kind}>{_text(name)}</th>" for kind, name in zip(mark, names, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td {kind}>{cell}</td>' for kind, cell in zip(mark, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _image(path: Path, description: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{content}">'
