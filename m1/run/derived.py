"""The files of other programs that are derived from the records of the stages: dvc.yaml and prefect.yaml.

They are in the repository, for `dvc repro` and `prefect deploy`; a test compares them with the records, and `m1 up`
rewrites them when a stage was added or its record has changed.
"""

from __future__ import annotations

import importlib.metadata

from m1 import paths
from m1.files import write_text
from m1.run.identity import all_code_of
from m1.run.registry import stages
from m1.run.stage import Stage

#: Where runs of the deployments wait for their worker.
WORK_POOL = "m1-local"
_DVC_HEAD = """\
# The data stages, each with the very command that the flow runs. `dvc repro` builds the data of every profile listed in
# params.yaml; `dvc repro tokens@tiny` builds one data set and what it needs.
# A stage depends on the code that it can reach by its imports, on its sections of the profile and on what it reads.
# Written from the stages' own records by `m1 up`; change those.
stages:
"""
_PREFECT_HEAD = """\
# Deployments of the one flow. `m1 up` applies this file; by hand: `prefect --no-prompt deploy --all`.
# `m1/full` runs the profile's whole order, every other deployment one stage of it.
# Written from the stages' own records by `m1 up`; change those.
"""


def update() -> list[str]:
    """Rewrite the files that differ from the records; returns their names."""
    changed = []
    for name, render in (("dvc.yaml", dvc_yaml), ("prefect.yaml", prefect_yaml)):
        path, text = paths.ROOT / name, render()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            changed.append(name)
    return changed


def dvc_yaml() -> str:
    """A DVC stage for every stage that writes data."""
    return _DVC_HEAD + "\n".join(_dvc_stage(record) for record in stages().values() if record.makes_data)


def _dvc_stage(record: Stage) -> str:
    code = [str(path.relative_to(paths.ROOT)) for path in all_code_of(record)]
    deps = [*code, *record.spec_paths, *(f"data/${{item}}/{name}" for name in record.reads)]
    lines = [
        f"  {record.name}:",
        "    foreach: ${profiles}",
        "    do:",
        f"      cmd: python -m {record.package} --profile ${{item}}",
        "      deps:",
        *(f"        - {dep}" for dep in deps),
        "      params:",
        "        - profiles/${item}.yaml:",
        *(f"            - {name}" for name in (record.name, *record.settings)),
        "      outs:",
        f"        - data/${{item}}/{record.name}",
    ]
    return "\n".join(lines) + "\n"


def prefect_yaml() -> str:
    """A deployment for the whole order, and one for every stage."""
    head = f"""\
{_PREFECT_HEAD}name: m1
prefect-version: {importlib.metadata.version("prefect")}
pull: null

definitions:
  common: &common
    entrypoint: flows/pipeline.py:pipeline
    work_pool: {{name: {WORK_POOL}}}
    tags: [m1]

deployments:
"""
    full = _deployment("full", "Every stage in the profile's order; unchanged ones are skipped.", "{profile: tiny}")
    each = [_deployment(name, record.about, f"{{profile: tiny, only: [{name}]}}") for name, record in stages().items()]
    return head + full + "".join(each)


def _deployment(name: str, description: str, parameters: str) -> str:
    return f"""\
  - name: {name}
    <<: *common
    description: "{description}"
    parameters: {parameters}
"""
