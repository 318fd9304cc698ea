"""The command line of every stage: `python -m stages.<name> --profile tiny`."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from infra import machine, tools
from infra.launch import run_stage
from m1 import paths
from m1.config.profile import Profile
from m1.environment import forget_outer_run
from m1.errors import Checkpointed, M1Error, ServiceError, UsageError
from m1.files import unfinished, write_json
from m1.planning import preflight
from m1.run import identity, profiles
from m1.run.contract import StageContext, StageRequest, StageResult, Summary, finished
from m1.run.registry import of_package
from m1.run.resolve import resolve, resumed
from m1.run.stage import Stage
from m1.streams import make_readable


def main(package: str, argv: list[str] | None = None) -> None:
    """Run the stage of a package; of several, the one that `--stage` names, by default the first."""
    make_readable()
    records = of_package(package)
    forget_outer_run(is_rank="--request" in (sys.argv if argv is None else argv))
    try:
        if records[0].makes_data:
            _data_command(records[0], argv)
        else:
            _run_command(records, argv)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "Free disk space (old runs are in runs/)" if full else "Correct the permissions"
        again = "" if records[0].makes_data else ": it goes on from its last complete checkpoint"
        kind = ServiceError if full else M1Error
        _fail(kind(f"{records[0].name}: {error}", f"{hint}, then rerun{again}."))
    except M1Error as error:
        # Ranks that stopped together say so once.
        _fail(error, silent=isinstance(error, Checkpointed) and os.environ.get("RANK", "0") != "0")


def _fail(error: M1Error, *, silent: bool = False) -> None:
    if not silent:
        sys.stderr.write(f"error: {error}\n")  # in one piece: another rank may be saying the same
    raise SystemExit(error.exit_code) from None


def _function(record: Stage) -> Callable[..., object]:
    module, _, name = record.run.partition(":")
    return getattr(importlib.import_module(module), name)


def _require_asked(record: Stage, profile: Profile) -> None:
    """A profile need not have every stage that there is.

    Raises:
        UsageError: the profile does not ask for this one.
    """
    data = record.makes_data and profile.find(record.name, record.section) is not None
    if not data and record.name not in profile.order:
        hint = f"Put it into the order of profile {profile.name} and give it a section, or name another profile."
        raise UsageError(f"profile {profile.name} does not ask for {record.name}", hint)


def _run_command(records: tuple[Stage, ...], argv: list[str] | None) -> None:
    """Execute a request in this process (what the launcher starts), or resolve one and launch it."""
    parser = argparse.ArgumentParser(prog=f"python -m {records[0].package}", description=records[0].about)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--stage", choices=[record.name for record in records], default=records[0].name)
    parser.add_argument("--upstream", type=Path, help="run folder to start from")
    parser.add_argument("--force", action="store_true", help="redo the work even if it is complete")
    parser.add_argument(
        "--resume", type=Path, help="unfinished run folder of this stage, at another parallel layout, to continue"
    )
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.request:
        request = StageRequest.model_validate_json(options.request.read_bytes())
        record = next(record for record in records if record.name == request.stage)
        work = cast(Callable[[StageContext], StageResult], _function(record))
        work(StageContext(request))
        return
    profile = profiles.load(options.profile)
    _require_asked(next(record for record in records if record.name == options.stage), profile)
    preflight.check(profile, [options.stage], lambda need: None, machine.memory_of_rank(profile.parallel))
    request = resolve(options.stage, profile, tools.missing, parent=options.upstream)
    if finished(request) is not None and not options.force:  # what is complete needs nothing any more
        print(f"{options.stage} is complete: {paths.shown(request.run)}; --force does it again")
        return
    preflight.check(profile, [options.stage], tools.missing)
    if options.resume:
        request = resumed(request, options.resume)
    run_stage(request, force=options.force)


def _data_command(record: Stage, argv: list[str] | None) -> None:
    """Make a data set: the command in dvc.yaml.

    The work is done in an empty folder, which takes the place of `data/<profile>/<stage>` once it is complete. What
    the stage returns is stored there as `summary.json`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {record.package}", description=record.about)
    parser.add_argument("--profile", default="tiny")
    profile = profiles.load(parser.parse_args(argv).profile)
    _require_asked(record, profile)
    preflight.check(profile, [record.name], tools.missing)
    final = paths.data_dir(profile.name, record.name)
    made_by = identity.data_identity(record, profile)
    work = cast(Callable[[Profile, Path], Summary], _function(record))
    with unfinished(final, sole_writer=True) as output:
        output.mkdir(parents=True)
        write_json(output / "summary.json", work(profile, output))
    identity.note_made(record, profile, made_by)
