"""Make software-engineering tasks: python -m stages.swe --spec data_specs/swe.yaml --out DIR --limit N."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infra.sandbox import DockerSandboxes
from m1.errors import M1Error, UsageError
from m1.streams import make_readable
from m1.tasks.swe import make, sources
from m1.tasks.swe.endpoint import Endpoint


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
    make_readable()
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
    endpoint = Endpoint(options.endpoint, options.model, options.out / "answers") if options.endpoint else None
    settings = make.Options(
        limit=options.limit, seed=options.seed, workers=options.workers, ask=endpoint, model=options.model,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    wanted = options.packages.split(",") if options.packages else []
    print(make.table(options.out, make.make_set(DockerSandboxes(), spec, wanted, options.out, settings)))


if __name__ == "__main__":
    main()
