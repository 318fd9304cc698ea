"""Make software-engineering tasks: python -m stages.swe --spec data_specs/swe.yaml --out DIR --limit N."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from infra.sandbox import Sandbox
from infra.sandbox.images import build_environment
from m1.errors import M1Error, UsageError
from stages.swe import run, sources
from stages.swe.endpoint import Endpoint
from stages.swe.reward import LIMITS
from stages.swe.tasks import write_environments


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, default=Path("data_specs/swe.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the set; a set that is there is continued")
    parser.add_argument("--limit", type=int, default=100, help="valid faults wanted of each source")
    parser.add_argument("--packages", default="", help="names of sources, with commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="sandbox jobs at once")
    parser.add_argument("--endpoint", default="", help="OpenAI-style URL of a model that words the issues")
    parser.add_argument("--model", default="", help="its name there")
    options = parser.parse_args(argv)
    try:
        synthesize(options)
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def synthesize(options: argparse.Namespace) -> None:
    """Every source's shard, then the set and its table."""
    for name in ("limit", "workers"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)} is below 1", "Give at least 1.")
    if options.endpoint and not options.model:
        raise UsageError("--endpoint without --model", "Name the model.")
    spec = sources.load(options.spec)
    wanted = options.packages.split(",") if options.packages else [origin.name for origin in spec.origins]
    known = {origin.name: origin for origin in spec.origins}
    for name in wanted:
        if name not in known:
            raise UsageError(f"--packages {name}: not in {options.spec}", f"Known: {', '.join(known)}.")
    endpoint = Endpoint(options.endpoint, options.model, options.out / "answers") if options.endpoint else None
    settings = run.Options(
        limit=options.limit, seed=options.seed, workers=options.workers, ask=endpoint, model=options.model,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    by_environment = defaultdict(list)
    for name in wanted:
        by_environment[known[name].environment].append(known[name])
    summaries, failed = {}, []
    for environment, origins in by_environment.items():
        image = build_environment(environment, spec.environments[environment].requirements)
        with Sandbox(image=image, warm=options.workers, limits=LIMITS) as sandbox:
            for origin in origins:
                try:
                    summaries[origin.name] = run.make_shard(sandbox, spec, origin, options.out, settings)
                except UsageError as error:  # of this source alone; the others are made all the same
                    settings.report(f"error: {error}")
                    failed.append(origin.name)
    ordered = [summaries[name] for name in wanted if name in summaries]
    run.assemble(options.out, ordered)
    write_environments(options.out, {name: made.requirements for name, made in spec.environments.items()})
    print(run.table(options.out, ordered))
    if failed:
        raise UsageError(f"no tasks were made of {', '.join(failed)}", "Mend what is said above, and run it again.")


if __name__ == "__main__":
    main()
