"""The experiment of a profile: opened as one of training runs, with a description and tables that are prepared.

A prepared table is what MLflow calls a saved view: an experiment's tag with the state of the page as JSON.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from m1.config.profile import Profile
from m1.run.registry import stage as stage_record
from m1.tracking import notes, pages, registry
from m1.tracking.limits import EXPERIMENT_TAG_LENGTH, cut_note
from m1.tracking.server import NOTE, Server

if TYPE_CHECKING:
    from mlflow.entities import Experiment

#: What an experiment is for. Version 3.17 shows it but opens pages by its address bar alone: `m1.tracking.pages`.
_KIND = "mlflow.experimentKind"
_TRAINING = "custom_model_development"
#: Hashes of the descriptions that were written last: another one is a person's, and stays. Pages do not show what
#: begins with mlflow.
_WRITTEN = "mlflow.m1.description"
_VIEW = "mlflow.sharedViewState."
#: Tag of every run, "flow run" or "stage": what a table shows is chosen by it.
LEVEL = "level"
FLOW_LEVEL, STAGE_LEVEL = "flow run", "stage"


@dataclass(frozen=True)
class View:
    """A prepared table of runs.

    Attributes:
        name: in the menu "Views" and in the description.
        wanted: filter of the runs, in MLflow's language.
        order: column it is sorted by; in falling order if it is the time of creation.
        columns: such as "metrics.`seconds`".
    """

    identity: str
    name: str
    wanted: str
    order: str
    columns: tuple[str, ...]

    def state(self) -> str:
        """The state of the page, as MLflow keeps it."""
        content = {
            "searchFilter": self.wanted,
            "orderByKey": self.order,
            "orderByAsc": self.order != _CREATED,
            "selectedColumns": list(self.columns),
            "columnOrder": [*_FIXED_WIDTHS, *self.columns],
            "columnWidths": _FIXED_WIDTHS | {column: _width(column) for column in self.columns},
        }
        return json.dumps(content)


_CREATED = "attributes.start_time"
FLOW_RUNS, NEWEST = "m1-flow-runs", "m1-newest"
_NAMES = {FLOW_RUNS: "flow runs side by side", NEWEST: "the newest, stage by stage"}
_KEY_METRIC, _KEY_METRIC_WIDTH = "tags.`key_metric`", 200
_STAGE_COLUMNS = (
    "tags.`state`",
    "metrics.`seconds`",
    _KEY_METRIC,
    "metrics.`key/before`",
    "metrics.`key/after`",
)
#: Columns that every table of runs has, and their widths in pixels.
_FIXED_WIDTHS = {"attributes.`Run Name`": 220, "runDateAndNestInfo": 140, "duration": 80}
_LOOKED_AT = 20  #: newest flow runs whose results are columns


def _width(column: str) -> int:
    """Room for the whole name of a column, in pixels."""
    return _KEY_METRIC_WIDTH if column == _KEY_METRIC else max(100, 40 + 6 * len(column.partition(".")[2]))


def title(profile: Profile, name: str) -> str:
    """A stage with its number in the profile's order: sorted by name, stages stand as the recipe has them."""
    number = profile.order.index(name) + 1 if name in profile.order else 0
    return f"{number:02d} {name}"


def open_experiment(server: Server, profile: Profile) -> str:
    """The id of the profile's experiment, which is made if need be, or taken out of the bin."""
    found = _find_or_create(server, registry.model_name(profile.name))
    if found.lifecycle_stage == "deleted":  # in the UI's bin, from where its name stays taken
        server.client.restore_experiment(found.experiment_id)
    if found.tags.get(_KIND) != _TRAINING:
        server.client.set_experiment_tag(found.experiment_id, _KIND, _TRAINING)
    return found.experiment_id


def _find_or_create(server: Server, name: str) -> Experiment:
    from mlflow.exceptions import MlflowException

    found = server.client.get_experiment_by_name(name)
    if found is None:
        try:
            server.client.create_experiment(name, tags={_KIND: _TRAINING})
        except MlflowException as error:
            if not registry.exists_already(error):
                raise
        found = server.client.get_experiment_by_name(name)
    assert found is not None
    return found


def describe(server: Server, experiment: str, profile: Profile, flow_run: str, newest: str) -> None:
    """Write the experiment's description and its prepared tables anew.

    Args:
        flow_run: id of the newest flow run.
        newest: how that went, in one sentence of Markdown.
    """
    flow_runs = f"tags.{LEVEL} = '{FLOW_LEVEL}'"
    found = server.client.search_runs([experiment], flow_runs, max_results=_LOOKED_AT)
    results = {name for run in found for name in run.data.metrics if name.startswith("result/")}
    names = ("total_seconds", "stages_run", *_last_first(results, profile), "stages_skipped", "stages_failed")
    metrics = [f"metrics.`{name}`" for name in names]
    children = f"tags.`mlflow.parentRunId` = '{flow_run}'"
    views = (
        View(FLOW_RUNS, _NAMES[FLOW_RUNS], flow_runs, _CREATED, tuple(metrics)),
        View(NEWEST, _NAMES[NEWEST], children, "tags.`mlflow.runName`", _STAGE_COLUMNS),
    )
    tags = server.client.get_experiment(experiment).tags
    for view in views:
        _write_view(server, experiment, view, tags.get(f"{_VIEW}{view.identity}"))
    prepared = [(view.name, pages.experiment_page(experiment, view.identity)) for view in views]
    abouts = {title(profile, name): stage_record(name).about for name in profile.order}
    _write_note(server, experiment, tags, notes.experiment_note(profile.name, newest, prepared, abouts))


def _last_first(results: Iterable[str], profile: Profile) -> list[str]:
    """Results by the stage they are of, the last stage first, as there is room for some; the plain family first."""
    place = {name: number for number, name in enumerate(profile.order)}
    return sorted(results, key=lambda name: (name.count("/"), -place.get(name.rpartition("/")[2], -1), name))


def _write_view(server: Server, experiment: str, view: View, present: str | None) -> None:
    """Write a prepared table unless it is there as it should be."""
    state = view.state()
    if present is None or json.loads(present).get("state") != state:
        now = int(time.time() * 1000)
        content = {"name": view.name, "createdAt": now, "updatedAt": now, "state": state}
        server.client.set_experiment_tag(experiment, f"{_VIEW}{view.identity}", json.dumps(content))


def _write_note(server: Server, experiment: str, tags: Mapping[str, str], text: str) -> None:
    present, written = tags.get(NOTE), tags.get(_WRITTEN, "").split()
    if present and _hash(present) not in written:
        return
    text = cut_note(text, EXPERIMENT_TAG_LENGTH)
    if text == present:
        return
    # Both, and before the text: whichever of the two is there after a crash is known as ours.
    hashes = [_hash(text), *([_hash(present)] if present else [])]
    server.client.set_experiment_tag(experiment, _WRITTEN, " ".join(hashes))
    server.client.set_experiment_tag(experiment, NOTE, text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
