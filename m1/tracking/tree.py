"""From a model back to everything it was made from: parent checkpoints, data hashes, code, profile, flow runs.

Read from MLflow and dvc.lock alone. What neither of them knows is named as missing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from m1 import paths
from m1.errors import UsageError
from m1.run.registry import data_stages
from m1.tracking import records, registry

if TYPE_CHECKING:
    from rich.tree import Tree

    from m1.tracking.runs import Tracker

MISSING = "missing"
#: What the tree shows of a raw source; the JSON has all its summary says.
_SOURCE_FACTS = ("name", "package", "version", "sha256", "licence", "license")


def lineage_dict(tracker: Tracker, reference: str) -> dict[str, Any]:
    """The lineage of a model as plain values.

    Args:
        reference: `model@alias` (such as "m1-tiny@rl-80k"), `model/version`, or `model/run` with an MLflow run name, a
            run id or its first digits (four at least).

    Returns:
        for the checkpoint: model, version, stage, fingerprint, path, profile, git_commit, prefect_run_id, run_id,
        key_metric, data (each with digest, command, deps, sources and its own data), parent (the same again, or None),
        missing (what is not known, in words).

    Raises:
        UsageError: no such model; lists those there are.
        ServiceError: MLflow does not answer.
    """
    with registry.service(tracker.uri):
        run, version = _resolve(tracker, reference)
        return _Walk(tracker).checkpoint(run, version, frozenset())


def lineage(tracker: Tracker, reference: str) -> Tree:
    """`lineage_dict` as a tree for the terminal. A data set met twice is described once."""
    from rich.tree import Tree

    node = lineage_dict(tracker, reference)
    tree = Tree(_title(node))
    _draw(tree, node, set())
    return tree


def _resolve(tracker: Tracker, reference: str) -> tuple[Any | None, Any | None]:
    """(run, version) of a reference."""
    from mlflow.exceptions import MlflowException

    client = tracker.client
    name, at, alias = reference.rpartition("@")
    if not at:
        name, _, alias = reference.partition("/")
    try:
        if at:
            version = client.get_model_version_by_alias(name, alias)
            return _run(client, version.run_id), version
        if alias.isdigit() and len(alias) < 10:
            version = client.get_model_version(name, alias)
            return _run(client, version.run_id), version
    except MlflowException as error:
        if not registry.is_missing(error) and getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
            raise
    if not at and alias and name.startswith("m1-"):
        runs = [run for run in tracker.matching_runs(alias, name.removeprefix("m1-")) if "stage" in run.data.tags]
        if len({run.data.tags.get("fingerprint") for run in runs}) == 1:
            return runs[-1], None
    known = [f"{m.name}@{alias}" for m in client.search_registered_models() for alias in sorted(m.aliases)]
    listing = f"There are: {', '.join(known)}." if known else "This MLflow holds no model yet; run `m1/full` first."
    raise UsageError(f"no model {reference!r}", f"Name one as model@alias or model/version. {listing}")


def _run(client: Any, run_id: str | None) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if registry.is_missing(error):
            return None
        raise


class _Walk:
    """One walk from a checkpoint to its origins; asks for every thing once."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker, self.client = tracker, tracker.client
        self._data_sets: dict[tuple[str, str], dict[str, Any]] = {}
        self._names: dict[str, dict[str, str]] = {}

    def checkpoint(self, run: Any | None, version: Any | None, below: frozenset[str]) -> dict[str, Any]:
        """The node of one run; `below` holds the fingerprints on the way here, against a circle in the records."""
        run_tags = dict(run.data.tags) if run else {}
        if run_tags.get("skipped") == "true":  # a run that only found the work done: who did it, it cannot know
            for key in ("git_commit", "git_dirty", "prefect_run_id"):
                run_tags.pop(key, None)
        tags = {**(version.tags if version else {}), **run_tags}
        if version is None and "fingerprint" in tags:
            version = registry.find_version(self.client, registry.model_name(tags["profile"]), tags["fingerprint"])
            tags = {**(version.tags if version else {}), **tags}
        keys = ("stage", "profile", "fingerprint", "path", "git_commit", "git_dirty", "prefect_run_id")
        node: dict[str, Any] = {key: tags.get(key, MISSING) for key in keys}
        node |= {
            "model": version.name if version else None,
            "version": str(version.version) if version else None,
            "aliases": self._aliases(version) if version else [],
            "run_id": run.info.run_id if run else MISSING,
            "run_url": self.tracker.url(run) if run else MISSING,
            "key_metric": tags.get("key_metric"),
            "before": run.data.metrics.get("key/before") if run else None,
            "after": run.data.metrics.get("key/after") if run else None,
            "missing": [key for key in keys if key not in tags],
        }
        if run is None:
            node["missing"].append(f"MLflow run {version.run_id if version else '?'}")
        if node["path"] != MISSING and not (paths.ROOT / node["path"] / "result.json").is_file():
            node["missing"].append(f"run folder {node['path']}")
        read = [name for name in data_stages() if f"dvc.{name}" in tags]
        node["data"] = [self.data_set(node["profile"], name, tags[f"dvc.{name}"]) for name in read]
        if "init_from_folder" in tags:
            node["base"] = {part: tags.get(f"init_from_{part}", MISSING) for part in ("folder", "digest")}
        node["parent"] = self._parent(tags, below | {node["fingerprint"]})
        return node

    def data_set(self, profile_name: str, stage: str, digest: str) -> dict[str, Any]:
        """One data set and what it was made from. MLflow's record counts; else dvc.lock's, if it has this very hash."""
        name = f"{stage}@{profile_name}"
        if (name, digest) in self._data_sets:
            return self._data_sets[name, digest]
        node: dict[str, Any] = {"name": name, "digest": digest, "deps": [], "data": [], "missing": []}
        self._data_sets[name, digest] = node
        lock = records.locked(stage, profile_name)
        node["in_dvc_lock"] = "absent" if lock is None else "same" if lock.digest == digest else f"now {lock.digest}"
        record, commit = self._logged_record(profile_name, name, digest)
        if record is not None:
            node |= {"recorded_in": "MLflow", "git_commit": commit}
        elif lock is not None and lock.digest == digest:
            record = lock
            node |= {"recorded_in": "dvc.lock", "git_commit": MISSING}
        else:
            node["missing"].append(f"how {name} with hash {digest} was made: neither MLflow nor dvc.lock says")
            return node
        node |= {"path": record.path, "command": record.command, "params": record.params, "sources": record.sources}
        for path, hash_ in record.deps:
            upstream = next((other for other in data_stages() if path == f"data/{profile_name}/{other}"), None)
            if upstream is None:
                node["deps"].append({"path": path, "md5": hash_})
            else:
                node["data"].append(self.data_set(profile_name, upstream, hash_))
        return node

    def _parent(self, tags: dict[str, str], below: frozenset[str]) -> dict[str, Any] | None:
        """The node a checkpoint was trained from; None for one trained from scratch."""
        fingerprint = tags.get("upstream_fingerprint")
        if fingerprint is None:
            return None
        run = None if tags.get("upstream_run") == MISSING else _run(self.client, tags.get("upstream_run"))
        if run is None and fingerprint != MISSING:
            run = self.tracker.original_run(tags["profile"], fingerprint)
        version = registry.find_version(self.client, registry.model_name(tags["profile"]), fingerprint)
        if run is None and version is not None:
            run = _run(self.client, version.run_id)
        if (run is None and version is None) or fingerprint in below:
            stage = tags.get("upstream_stage", "?")
            return {"stage": stage, "fingerprint": fingerprint, "missing": [f"the {stage} run {fingerprint[:16]}"]}
        return self.checkpoint(run, version, below)

    def _aliases(self, version: Any) -> list[str]:
        if version.name not in self._names:
            self._names[version.name] = self.client.get_registered_model(version.name).aliases
        return sorted(
            alias for alias, number in self._names[version.name].items() if str(number) == str(version.version)
        )

    def _logged_record(self, profile_name: str, name: str, digest: str) -> tuple[records.DataRecord | None, str]:
        """Record and git commit of a data set as the first run that had it noted them; a bare hash is no record."""
        from m1.tracking.datasets import DvcSource

        experiment = self.client.get_experiment_by_name(registry.model_name(profile_name))
        wanted = f"dataset.digest = '{digest}' and dataset.name = '{name}'"
        found = self.client.search_runs([experiment.experiment_id], wanted, max_results=1) if experiment else []
        for logged in (entry.dataset for run in found if run.inputs for entry in run.inputs.dataset_inputs):
            if (logged.name, logged.digest) == (name, digest):
                source = DvcSource.from_dict(json.loads(logged.source))
                return (source.record if source.record.command else None), source.git_commit
        return None, MISSING


def _title(node: dict[str, Any]) -> str:
    from rich.markup import escape

    if "run_id" not in node:
        return f"[bold]{escape(node['stage'])}[/]"
    model = f"{node['model']} version {node['version']}" if node["model"] else f"run {node['run_id']}"
    aliases = f" @{', @'.join(node['aliases'])}" if node["aliases"] else ""
    return f"[bold]{escape(node['stage'])}[/] {escape(model)}[cyan]{escape(aliases)}[/]"


def _draw(tree: Tree, node: dict[str, Any], told: set[str]) -> None:
    """Add a checkpoint's facts, data and parent to `tree`."""
    from rich.markup import escape

    for fault in node["missing"]:
        tree.add(f"[red]missing: {escape(fault)}[/]")
    if "run_id" not in node:
        return
    if node["key_metric"] and node["after"] is not None:
        before = "" if node["before"] is None else f"{node['before']:.4g} -> "
        tree.add(f"{escape(node['key_metric'])}: {before}{node['after']:.4g}")
    dirty = " (with uncommitted changes)" if node["git_dirty"] == "true" else ""
    tree.add(f"run folder {escape(node['path'])}")
    tree.add(f"fingerprint {node['fingerprint']}")
    tree.add(f"git commit {node['git_commit']}{dirty}")
    tree.add(f"profile {node['profile']} (artifact profile.yaml of the MLflow run)")
    tree.add(f"MLflow run {node['run_id']}")
    tree.add(f"Prefect run {node['prefect_run_id']}")
    for data in node["data"]:
        _draw_data(tree, data, told)
    if "base" in node:
        tree.add(f"from the base model {escape(node['base']['folder'])}, digest {node['base']['digest']}")
    elif node["parent"] is None:
        tree.add("trained from scratch")
    else:
        _draw(tree.add(f"from {_title(node['parent'])}"), node["parent"], told)


def _draw_data(tree: Tree, data: dict[str, Any], told: set[str]) -> None:
    from rich.markup import escape

    note = {"same": "", "absent": " (not in dvc.lock)"}.get(data["in_dvc_lock"], f" (dvc.lock: {data['in_dvc_lock']})")
    if (told_as := f"{data['name']} {data['digest']}") in told:
        tree.add(f"data [green]{escape(data['name'])}[/] md5 {data['digest']}, as above")
        return
    told.add(told_as)
    branch = tree.add(f"data [green]{escape(data['name'])}[/] md5 {data['digest']}{escape(note)}")
    for fault in data["missing"]:
        branch.add(f"[red]missing: {escape(fault)}[/]")
    if "command" not in data:
        return
    branch.add(f"made by `{escape(data['command'])}` at git commit {data['git_commit']} (from {data['recorded_in']})")
    for dep in data["deps"]:
        branch.add(f"read {escape(dep['path'])} md5 {dep['md5'] or MISSING}")
    if data["sources"]:
        sources = branch.add("raw sources")
        for source in data["sources"]:
            facts = [f"{key} {source[key]}" for key in _SOURCE_FACTS if key in source] or [str(source)]
            sources.add(escape(", ".join(facts)))
    for upstream in data["data"]:
        _draw_data(branch, upstream, told)
