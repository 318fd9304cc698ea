"""Addresses of MLflow's pages, relative to the server's root: they stay right when it comes back on another port."""

from __future__ import annotations

from urllib.parse import quote

#: Without it MLflow 3.17 shows every page as one of an application of language models, whatever an experiment's tags
#: say, unless the browser has been told otherwise.
_TRAINING = "workflowType=machine_learning"


def experiment_page(experiment: str, view: str = "") -> str:
    """The table of an experiment's runs; `view` is the id of a prepared table."""
    return f"#/experiments/{experiment}/runs?{_TRAINING}" + (f"&viewStateShareKey={view}" if view else "")


def run_page(experiment: str, run: str) -> str:
    return f"#/experiments/{experiment}/runs/{run}?{_TRAINING}"


def artifact_page(experiment: str, run: str, path: str) -> str:
    """The page that shows a file of a run."""
    return f"#/experiments/{experiment}/runs/{run}/artifacts/{quote(path)}?{_TRAINING}"


def artifact_source(run: str, path: str) -> str:
    """The file itself, for an image in a description."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run}"


def version_page(model: str, version: str) -> str:
    """The page of a model version."""
    return f"#/models/{quote(model)}/versions/{version}?{_TRAINING}"
