"""The report: one HTML page about the newest run of every stage, made from the run folders alone, without a server.

`report_stages` reads what is there, `report_parts` turns it into what the page shows (`report_page`), and
`templates/report.html.j2` into HTML, where every text is escaped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m1 import paths
from m1.config.profile import Profile
from m1.errors import UsageError
from m1.files import write_text
from m1.run import profiles
from m1.run.stage import Cost
from m1.tracking import report_parts, report_stages
from m1.tracking.report_page import Figure, Page
from m1.tracking.report_stages import Stage

#: stage -> what it was expected to process.
Plan = Mapping[str, Cost]
_TEMPLATES = Path(__file__).with_name("templates")


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
    stages = report_stages.load(settings)
    if not any(stage.done for stage in stages):
        raise UsageError(
            f"profile {settings.name} has no finished stage to report on",
            f"Run `m1 run --profile {settings.name}` first.",
        )
    of_run = _settings_of_run(settings, stages)
    if of_run.order != settings.order:
        stages = report_stages.load(of_run)
    settings = of_run
    plan = planned(settings) if planned else {}
    page = report_parts.page(settings, stages, plan, _curves(stages))
    path = paths.runs_dir(settings.name, "").resolve() / "report.html"
    write_text(path, render(page))
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(page=page)


def _settings_of_run(settings: Profile, stages: Sequence[Stage]) -> Profile:
    """The settings the newest run was made with; the profile's file may have changed since, or had overrides."""
    results = [stage.run.result for stage in stages if stage.run is not None]
    if not results:
        return settings
    newest = max(results, key=lambda result: result.finished_at)
    try:
        return profiles.parse(newest.request.profile, "the newest run")
    except UsageError:
        return settings  # made with an older form of the profile


def _curves(stages: Sequence[Stage]) -> list[Figure]:
    from m1.tracking.pictures import embedded, spanning

    with tempfile.TemporaryDirectory() as folder:
        metrics = {stage.name: stage.run.lines for stage in stages if stage.run is not None}
        drawn = [embedded(path) for path in spanning(Path(folder), metrics)]
    return [figure for figure in drawn if figure is not None]


__all__ = ["render", "report"]
