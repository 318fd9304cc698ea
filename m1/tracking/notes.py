"""The descriptions of MLflow's pages: of an experiment, a flow run, a stage's run and a model version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from m1.run.contract import StageResult
from m1.run.summary import StageRow
from m1.tracking import glossary
from m1.tracking.markdown import (
    Picture,
    bullets,
    change,
    code,
    duration,
    link,
    number,
    page,
    pictures,
    plain,
    table,
)
from m1.tracking.records import Revision


@dataclass(frozen=True)
class DataLine:
    """A data set: its name, DVC's hash of it, and the page of the run that made it."""

    name: str
    digest: str
    page: str | None = None


@dataclass(frozen=True)
class StageLine:
    """What one stage did in a flow run, under its numbered title, with the page of its run."""

    title: str
    row: StageRow
    page: str | None


@dataclass(frozen=True)
class Solved:
    """Share of the held-out tasks of a family that the checkpoint of a stage solves; the plain family is ""."""

    family: str
    stage: str
    share: float


@dataclass(frozen=True)
class FlowFacts:
    """A flow run.

    Attributes:
        status: as MLflow names it: "RUNNING", "FINISHED", "FAILED" or "KILLED".
        error: what ended it, unless a stage says so.
        seconds: from its start to its end, or until now.
        outside: share of that time outside its stages.
        waiting: stages of the plan that have not begun.
        report: page of the report kept with the run, or the command that writes one.
    """

    profile: str
    status: str
    stages: tuple[StageLine, ...]
    seconds: float
    outside: float
    revision: Revision
    error: str = ""
    waiting: tuple[str, ...] = ()
    solved: tuple[Solved, ...] = ()
    data: tuple[DataLine, ...] = ()
    pictures: tuple[Picture, ...] = ()
    prefect: str | None = None
    profile_page: str | None = None
    report: str | None = None


@dataclass(frozen=True)
class StageFacts:
    """A stage's run.

    Attributes:
        state: "runs", or the status of its row; "killed" is a failure from outside.
        facts: label -> Markdown: where it comes from and what it left.
        names: of its metrics in MLflow.
    """

    about: str
    state: str
    reason: str = ""
    seconds: float | None = None
    key_metric: str | None = None
    before: float | None = None
    after: float | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    pictures: tuple[Picture, ...] = ()
    names: tuple[str, ...] = ()
    metrics_page: str | None = None


def gained(rows: Sequence[StageRow]) -> StageRow | None:
    """The row that tells most of what a flow run gained: the last with a key metric before and after."""
    return next((row for row in reversed(rows) if row.before is not None and row.after is not None), None)


def gain(rows: Sequence[StageRow]) -> str:
    """One clause on what a flow run gained, or nothing."""
    row = gained(rows)
    return f"{plain(row.key_metric or '')} **{change(row.before, row.after)}** ({row.stage})" if row else ""


def outcome(facts: FlowFacts) -> str:
    """One sentence on how a flow run went."""
    rows = [line.row for line in facts.stages]
    ran = sum(row.status == "ran" for row in rows)
    skipped = sum(row.status == "skipped" for row in rows)
    counts = [f"{_stages(ran)} ran", *([f"{skipped} up to date"] if skipped else [])]
    counted, took = ", ".join(counts), duration(facts.seconds)
    if facts.status == "RUNNING":
        return f"Running since {took}: {counted} so far"
    failed = next((row for row in rows if row.status == "failed"), None)
    where = f" at {failed.stage}" if failed else ""
    how = {"FAILED": f"Failed{where}", "KILLED": f"Stopped{where}"}.get(facts.status)
    return f"{how} after {took}: {counted}" if how else f"{counted[0].upper()}{counted[1:]} in {took}"


def _stages(count: int) -> str:
    return f"{count} stage" if count == 1 else f"{count} stages"


def flow_note(facts: FlowFacts) -> str:
    """The description of a flow run. Its first lines are what the page shows before "Show more"."""
    rows = [line.row for line in facts.stages]
    first = f"**{outcome(facts)}.**"
    if found := gain(rows):
        first += f" What it gained: {found}."
    failed = next((row for row in rows if row.status == "failed"), None)
    reason = failed.reason if failed else facts.error
    links = [link("flow run in Prefect", facts.prefect)] if facts.prefect else []
    links += [link("whole profile", facts.profile_page)] if facts.profile_page else []
    links += [facts.report] if facts.report else []
    return page(
        [first],
        [f"**Cause:** {plain(reason)}"] if reason else [],
        [" · ".join([f"Profile {code(facts.profile)}", f"commit {_commit(facts.revision)}", *links])],
        table(["stage", "what it did", "time", "key metric", "before → after"], map(_stage_cells, facts.stages)),
        [f"Not begun: {plain(', '.join(facts.waiting))}."] if facts.waiting else [],
        _left_out(rows),
        _solved(facts.solved),
        pictures(facts.pictures),
        _data("**Made from these data sets**", facts.data),
        [f"{100 * facts.outside:.1f}% of the time was spent outside the stages. {METRICS_HINT}"] if rows else [],
    )


METRICS_HINT = "What every metric means: artifact `metrics.md`."


def _stage_cells(line: StageLine) -> list[str]:
    row = line.row
    did = row.status if row.status != "skipped" else "up to date"
    took = duration(row.seconds) if row.seconds else ""
    return [link(line.title, line.page), did, took, plain(row.key_metric or ""), change(row.before, row.after)]


def _left_out(rows: Sequence[StageRow]) -> list[str]:
    lines = [f"{row.stage}: {plain(part)}" for row in rows for part in row.left_out]
    return ["**Left out**", "", *bullets(lines)] if lines else []


def _solved(found: Sequence[Solved]) -> list[str]:
    if not found:
        return []
    families = list(dict.fromkeys(each.family for each in found))
    stages = list(dict.fromkeys(each.stage for each in found))
    share = {(each.family, each.stage): each.share for each in found}
    rows = [[plain(family or "plain"), *(number(share.get((family, each))) for each in stages)] for family in families]
    title = "**Share of held-out tasks solved with one answer**, by the checkpoint of each stage"
    return [title, "", *table(["family of tasks", *map(plain, stages)], rows)]


def _data(title: str, found: Sequence[DataLine]) -> list[str]:
    rows = [[link(each.name, each.page), code(each.digest)] for each in found]
    return [title, "", *table(["data set", "DVC hash"], rows)] if rows else []


def _commit(revision: Revision) -> str:
    return code(revision.commit[:12]) + (" with uncommitted changes" if revision.dirty else "")


def stage_note(facts: StageFacts) -> str:
    """The description of a stage's run."""
    told = [plain(part) for part in facts.notes if part not in facts.left_out]
    explained = glossary.groups(facts.names)
    return page(
        [f"**{_state(facts)}** {plain(facts.about)}"],
        [f"**Cause:** {plain(facts.reason)}"] if facts.state in ("failed", "killed") and facts.reason else [],
        table(["", ""], [[label, text] for label, text in facts.facts]) if facts.facts else [],
        ["**Left out**", "", *bullets(map(plain, facts.left_out))] if facts.left_out else [],
        ["**Notes**", "", *bullets(told)] if told else [],
        pictures(facts.pictures),
        _explained(explained, facts.metrics_page),
    )


def _state(facts: StageFacts) -> str:
    took = f" in {duration(facts.seconds)}" if facts.seconds else ""
    words = {
        "runs": "Running.",
        "ran": f"Ran{took}",
        "skipped": "Up to date",
        "failed": f"Failed{f' after {duration(facts.seconds)}' if facts.seconds else ''}.",
        "killed": f"Stopped{f' after {duration(facts.seconds)}' if facts.seconds else ''}.",
    }
    text = words[facts.state]
    if facts.key_metric and facts.after is not None:
        text = text.rstrip(".")
        return f"{text}: {plain(facts.key_metric)} {change(facts.before, facts.after)}."
    return text if text.endswith(".") else f"{text}."


def _explained(groups: Mapping[str, str], metrics_page: str | None) -> list[str]:
    if not groups:
        return []
    lines = bullets(f"{code(f'{group}/')} {plain(text)}" for group, text in groups.items())
    return [f"**Metrics** ({link('each explained', metrics_page)})", "", *lines]


def version_note(about: str, result: StageResult, path: str) -> str:
    """The description of a model version."""
    return page(
        [f"{result.stage}: {plain(result.key_metric)} {change(result.before, result.after)}. {plain(about)}"],
        [f"The weights are in {code(path)}; this registry holds no copy of them."],
    )


def experiment_note(profile: str, newest: str, views: Sequence[tuple[str, str]], abouts: Mapping[str, str]) -> str:
    """The description of an experiment; of its first paragraph the page shows one line.

    Args:
        newest: what is to say of the newest flow run, in one sentence of Markdown, with a link to it.
        views: (title, page) of the tables that are prepared.
        abouts: numbered title of a stage -> what it does.
    """
    prepared = " · ".join(link(title, url) for title, url in views)
    return page(
        [f"{newest} · Tables: {prepared}"],
        [
            f"Training runs of profile {code(profile)}: from raw text to a model that reasons. A row of the table is "
            "one **flow run**; the plus sign before its name shows its stages, numbered in the order of the recipe. "
            "The description of a flow run says what ran, how long it took, what it gained and what was left out; "
            "that of a stage what it does, from which data and checkpoint, and what its metrics mean."
        ],
        table(["stage", "what it does"], [[title, plain(about)] for title, about in abouts.items()]),
        [
            "Checkpoints are versions of the registered model of the same name, the alias of a stage being its newest. "
            f"{code(f'm1 lineage m1-{profile}@STAGE')} prints what one was made from. "
            "Flow runs write this text anew; a text of your own stays."
        ],
    )
