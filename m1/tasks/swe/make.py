"""Make a set of tasks: one shard per source, complete or absent, continued where an interruption left it.

A shard is `sources/<name>/`: `tasks.jsonl`, `rejected.jsonl` (every candidate that fell out, with the reason), the
trees, the reliable tests and `summary.json`. While it is being made it is `sources/.<name>`, with a journal of what
has been judged; the folder is renamed when all is written.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from m1.errors import ServiceError, UsageError
from m1.files import read_lines, write_json, write_rows, write_text
from m1.rows import read_json
from m1.run.identity import code_digest
from m1.tasks.sandbox import Job, Kind, Sandboxes
from m1.tasks.swe import issue_text, validate
from m1.tasks.swe.candidates import Candidate, Sites, candidates
from m1.tasks.swe.commits import reverted_commits
from m1.tasks.swe.patches import Tree
from m1.tasks.swe.python_source import changed_locations
from m1.tasks.swe.reward import LIMITS
from m1.tasks.swe.runner import Runs
from m1.tasks.swe.sources import Package, Repository, SweSpec
from m1.tasks.swe.tasks import KINDS, SweTask, content_id, dump, write_environments, write_tests, write_tree
from m1.tasks.swe.validate import Baseline, Trial, Verdict

#: Most candidates that are judged together; what is lost by an interruption.
CHUNK = 24
#: About so many of them are valid.
YIELD = 0.8


@dataclass(frozen=True)
class Options:
    """How a set is made.

    Attributes:
        limit: valid faults wanted of each source.
        most: candidates tried for them, as a multiple of `limit`.
        ask: a model that words the issues.
        model: its name; part of what makes two sets different.
    """

    limit: int
    seed: int = 0
    most: int = 4
    workers: int = 2
    ask: Callable[[str], str] | None = None
    model: str = ""
    report: Callable[[str], None] = field(default=lambda line: None)

    def fingerprint(self, spec: SweSpec, origin: Package | Repository) -> str:
        """Of everything that decides what is in a shard, the code included (but not its comments and docstrings)."""
        environment = spec.environments[origin.environment].model_dump()
        parts = [origin.model_dump(), environment, self.limit, self.seed, self.most, self.model, code_digest(__name__)]
        return content_id(json.dumps(parts, sort_keys=True))


def shard(out: Path, name: str) -> Path:
    return out / "sources" / name


def make_shard(
    sandbox: Runs, spec: SweSpec, origin: Package | Repository, out: Path, options: Options
) -> dict[str, Any]:
    """Make a source's shard, or find it complete; its summary.

    Raises:
        UsageError: the folder holds a shard made with other settings; the tests of the source cannot be run.
    """
    final, print_ = shard(out, origin.name), options.fingerprint(spec, origin)
    if (final / "summary.json").is_file():
        summary = read_json(final / "summary.json")
        if not isinstance(summary, dict) or summary.get("fingerprint") != print_:
            raise UsageError(
                f"{final} was made with other settings or other code", "Choose another --out, or remove that folder."
            )
        return summary
    work = final.with_name(f".{origin.name}")
    work.mkdir(parents=True, exist_ok=True)
    journal = Journal(work / "journal.jsonl", print_)
    maker = _Package if isinstance(origin, Package) else _Commits
    made = maker(sandbox, origin, options, journal, work)  # type: ignore[arg-type]
    made.run()
    summary = {"fingerprint": print_, **made.summary()}
    write_text(work / "tasks.jsonl", "".join(dump(task) + "\n" for task in made.tasks))
    write_rows(work / "rejected.jsonl", made.rejected)
    write_json(work / "timing.json", {"seconds": round(journal.seconds, 1)})
    write_json(work / "summary.json", summary)
    journal.close()
    if final.exists():
        shutil.rmtree(final)  # without a summary it is not a shard
    work.rename(final)
    return summary


_ENTRY = {"key", "value", "seconds"}


class Journal:
    """What has been found out so far, one JSON object a line; begun again if the settings differ.

    A line that was cut off by an interruption is dropped, with all behind it.
    """

    def __init__(self, file: Path, fingerprint: str) -> None:
        self.known: dict[str, Any] = {}
        self.seconds = 0.0
        lines = self._read(file)
        if not lines or lines[0] != {"fingerprint": fingerprint}:
            lines = [{"fingerprint": fingerprint}]
        for line in lines[1:]:
            self.known[line["key"]] = line["value"]
            self.seconds += line["seconds"]
        write_rows(file, lines)
        self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115

    @staticmethod
    def _read(file: Path) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        try:
            for line in read_lines(file) if file.is_file() else ():
                content = json.loads(line)
                if not isinstance(content, dict) or (lines and not content.keys() >= _ENTRY):
                    break
                lines.append(content)
        except (ValueError, RecursionError):  # cut off, or not even UTF-8
            pass
        return lines

    def add(self, key: str, value: Any, seconds: float) -> None:
        self.known[key] = value
        self.seconds += seconds
        self._file.write(json.dumps({"key": key, "value": value, "seconds": round(seconds, 3)}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """The work is complete: the journal is not part of it."""
        self._file.close()
        Path(self._file.name).unlink()


class _Shard:
    """What the two kinds of source share: counts, and a valid fault as tasks."""

    origin: Package | Repository

    def __init__(self, sandbox: Runs, options: Options, journal: Journal, work: Path) -> None:
        self.sandbox, self.options, self.journal, self.work = sandbox, options, journal, work
        self.tasks: list[SweTask] = []
        self.rejected: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()
        self.started = time.monotonic()

    @property
    def valid(self) -> int:
        return self.reasons["valid"]

    def baseline(self, key: str, tree: Tree, *, coverage: bool) -> Baseline:
        """Measured, or read from the journal."""
        if key not in self.journal.known:
            started = time.monotonic()
            found = validate.measure(self.sandbox, self.origin, tree, self.options.workers, coverage=coverage)
            self.journal.add(key, asdict(found), time.monotonic() - started)
        known = self.journal.known[key]
        return Baseline(tuple(known["reliable"]), tuple(known["unreliable"]), known["lines"])

    def judged(self, baseline: Baseline, trials: Sequence[tuple[str, Trial]]) -> list[Verdict]:
        """Verdicts by key, those in the journal without running anything."""
        new = [(key, trial) for key, trial in trials if key not in self.journal.known]
        started = time.monotonic()
        verdicts = validate.judge(self.sandbox, self.origin, baseline, [t for _, t in new], self.options.workers)
        each = (time.monotonic() - started) / max(1, len(new))
        for (key, _), verdict in zip(new, verdicts, strict=True):
            self.journal.add(key, asdict(verdict), each)
        return [_verdict(self.journal.known[key]) for key, _ in trials]

    def reject(self, bug: str, reason: str, **details: Any) -> None:
        self.reasons[reason] += 1
        self.rejected.append({"bug": bug, "reason": reason, **details})

    def add(
        self, bug: str, base: str, origin: str, kinds: Sequence[str], right: Tree, faulty: Tree, baseline: Baseline,
        verdict: Verdict, setup_from: Tree,
    ) -> None:  # fmt: skip
        """Tasks of a valid fault, one of each kind; rejected if its patches or its issue will not do."""
        patches = validate.patches_between(right, faulty)
        if patches is None:
            return self.reject(bug, "gold", kinds=list(kinds))
        issue = self._issue(verdict, faulty, patches[1])
        if issue is None:
            return self.reject(bug, "leaks", kinds=list(kinds))
        failing = set(verdict.fail_to_pass) | set(verdict.unreliable)
        self.reasons["valid"] += 1
        for kind in KINDS:
            self.tasks.append(
                SweTask(
                    id=content_id(bug, kind),
                    kind=kind,
                    bug=bug,
                    source=self.origin.name,
                    base=base,
                    licence=self.origin.licence,
                    split=self.origin.split,
                    environment=self.origin.environment,
                    origin=origin,  # type: ignore[arg-type]
                    mutations=tuple(kinds),
                    issue=issue,
                    setup_patch=patches[0],
                    gold_patch=patches[1],
                    locations=tuple(changed_locations(faulty, right)),
                    fail_to_pass=verdict.fail_to_pass,
                    pass_to_pass=tuple(t for t in baseline.reliable if t not in failing)
                    if verdict.unreliable
                    else None,
                )
            )

    def _issue(self, verdict: Verdict, faulty: Tree, gold: str) -> str | None:
        """Of the failing tests, the one whose code says most in fewest lines."""
        more = len(verdict.fail_to_pass) - 1
        seen = [
            issue_text.observe(test, verdict.failures[test], faulty, self.origin.is_code, more)
            for test in sorted(verdict.failures)
        ]
        seen.sort(key=lambda item: (not item.snippet, not item.called[1], len(item.snippet)))
        return next((text for item in seen if (text := issue_text.issue(item, gold, self.options.ask))), None)

    def summary(self) -> dict[str, Any]:
        return {
            "source": self.origin.name,
            "split": self.origin.split,
            "licence": self.origin.licence,
            "candidates": sum(self.reasons.values()),
            "valid": self.valid,
            "reasons": {reason: self.reasons[reason] for reason in validate.REASONS if self.reasons[reason]},
            "tasks": len(self.tasks),
            "kinds": dict(sorted(Counter(kind for t in self.tasks[:: len(KINDS)] for kind in t.mutations).items())),
        }


def _verdict(known: dict[str, Any]) -> Verdict:
    return Verdict(known["reason"], tuple(known["fail_to_pass"]), tuple(known["unreliable"]), known["failures"])


class _Package(_Shard):
    """A shard of mutations."""

    def __init__(self, sandbox: Runs, origin: Package, options: Options, journal: Journal, work: Path) -> None:
        super().__init__(sandbox, options, journal, work)
        self.origin = self.package = origin
        self.sites: Sites | None = None
        self.reliable = self.unreliable = 0

    def run(self) -> None:
        package, options = self.package, self.options
        right, base = package.tree(), package.sha256[:12]
        baseline = self.baseline("baseline", right, coverage=True)
        self.reliable, self.unreliable = len(baseline.reliable), len(baseline.unreliable)
        self.sites = Sites(package, right, baseline.lines)
        source = islice(candidates(package, self.sites, str(options.seed)), options.limit * options.most)
        while chunk := list(islice(source, self._next_chunk())):
            trials = [(c.id, Trial(c.tree(right), baseline.covering(c.path, c.lines))) for c in chunk]
            for candidate, verdict in zip(chunk, self.judged(baseline, trials), strict=True):
                if self.valid < options.limit:
                    self._add(candidate, verdict, right, base, baseline)
            done = f"{self.valid} valid of {sum(self.reasons.values())} candidates"
            options.report(f"{package.name}: {done}, {time.monotonic() - self.started:.0f} s")
            if self.valid >= options.limit:
                break
        write_tree(self.work / f"{base}.tar.gz", right)
        write_tests(self.work / f"{base}.json", baseline.reliable)

    def _next_chunk(self) -> int:
        """How many candidates to judge for what is missing: more would be judged for nothing."""
        return min(CHUNK, max(4, math.ceil((self.options.limit - self.valid) / YIELD)))

    def _add(self, candidate: Candidate, verdict: Verdict, right: Tree, base: str, baseline: Baseline) -> None:
        if not verdict.valid:
            self.reject(candidate.id, verdict.reason, kinds=list(candidate.kinds), path=candidate.path)
            return
        faulty = candidate.tree(right)
        self.add(candidate.id, base, candidate.origin, candidate.kinds, right, faulty, baseline, verdict, right)

    def summary(self) -> dict[str, Any]:
        assert self.sites is not None
        found = {"mutations": self.sites.found, "mutations_reached": len(self.sites.covered)}
        return {**super().summary(), "tests": self.reliable, "unreliable_tests": self.unreliable, **found}


class _Commits(_Shard):
    """A shard of reverted commits. Each has a tree, and so a baseline, of its own."""

    def __init__(self, sandbox: Runs, origin: Repository, options: Options, journal: Journal, work: Path) -> None:
        super().__init__(sandbox, options, journal, work)
        self.origin = self.repository = origin

    def run(self) -> None:
        options = self.options
        unread: list[tuple[str, str]] = []
        for found in islice(
            reverted_commits(self.repository, lambda *each: unread.append(each)), options.limit * options.most
        ):
            base = found.commit[:12]
            try:
                baseline = self.baseline(f"baseline {base}", found.right, coverage=False)
            except UsageError as error:  # an old commit whose tests do not run here
                self.reject(base, "collection", message=str(error)[:300])
                continue
            [verdict] = self.judged(baseline, [(base, Trial(found.faulty, None))])
            if verdict.valid:
                before = len(self.tasks)
                self.add(base, base, "commit", (), found.right, found.faulty, baseline, verdict, found.right)
                if len(self.tasks) > before:
                    write_tree(self.work / f"{base}.tar.gz", found.right)
                    write_tests(self.work / f"{base}.json", baseline.reliable)
            else:
                self.reject(base, verdict.reason)
            options.report(f"{self.origin.name}: {self.valid} valid of {sum(self.reasons.values())} commits")
            if self.valid >= options.limit:
                break
        for commit, reason in unread:
            self.reject(commit[:12], "unread", message=reason[:300])


# --- the whole set ---


class NoSandbox(ServiceError):
    """No image could be made, or no job run in it. Nothing has been judged yet."""


def ready_images(sandboxes: Sandboxes, spec: SweSpec, environments: Iterable[str]) -> dict[str, str]:
    """Tags of images by environment; each has run a job.

    Raises:
        NoSandbox: of one of them that cannot be had.
    """
    images = {}
    for name in environments:
        try:
            images[name] = sandboxes.build(name, spec.environments[name].requirements)
            with sandboxes.open(images[name], warm=0, preload=False) as sandbox:
                result = sandbox.run(Job({}, ["python3", "-c", ""]))
        except ServiceError as error:
            raise NoSandbox(error.what, error.hint) from error
        if result.kind is not Kind.OK:
            raise NoSandbox(
                f"a first job in the image of environment {name} ended with {result.kind.name}: {result.message}",
                "See `docker info` and the engine's log; `m1 check` looks at the engine.",
            )
    return images


def make_set(
    sandboxes: Sandboxes, spec: SweSpec, wanted: Sequence[str], out: Path, options: Options
) -> list[dict[str, Any]]:
    """Every wanted source's shard (all if none is named), then the set; the summaries of the shards.

    Raises:
        UsageError: no such source; or, once the others are made, a source whose tests cannot be run.
        NoSandbox: before anything is judged; ServiceError: the engine died later.
    """
    known = {origin.name: origin for origin in spec.origins}
    wanted = wanted or list(known)
    for name in wanted:
        if name not in known:
            raise UsageError(f"no source named {name} in the spec", f"Known: {', '.join(known)}.")
    by_environment: dict[str, list[Package | Repository]] = {}
    for name in wanted:
        by_environment.setdefault(known[name].environment, []).append(known[name])
    images = ready_images(sandboxes, spec, by_environment)
    summaries, failed = {}, {}
    for environment, origins in by_environment.items():
        with sandboxes.open(images[environment], warm=options.workers, limits=LIMITS, preload=False) as sandbox:
            for origin in origins:
                try:
                    summaries[origin.name] = make_shard(sandbox, spec, origin, out, options)
                except UsageError as error:  # of this source alone; the others are made all the same
                    options.report(f"error: {error}")
                    failed[origin.name] = error
    ordered = [summaries[name] for name in wanted if name in summaries]
    out.mkdir(parents=True, exist_ok=True)
    assemble(out, ordered)
    write_environments(out, {name: made.requirements for name, made in spec.environments.items()})
    if failed:
        first = next(iter(failed.values()))
        raise UsageError(f"no tasks were made of {', '.join(failed)}: {first.what}", first.hint)
    return ordered


def set_id(spec: SweSpec, wanted: Sequence[str], options: Options) -> str:
    """16 hex digits that differ where the sets would."""
    origins = [origin for origin in spec.origins if not wanted or origin.name in wanted]
    return content_id(*(options.fingerprint(spec, origin) for origin in origins))


def assemble(out: Path, summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`tasks.jsonl` of all shards in the order given, and `summary.json`; tasks of the same content are kept once."""
    lines: dict[str, str] = {}
    for summary in summaries:
        for line in read_lines(shard(out, summary["source"]) / "tasks.jsonl"):
            lines.setdefault(json.loads(line)["id"], line)
    write_text(out / "tasks.jsonl", "".join(line + "\n" for line in lines.values()))
    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary["reasons"])
    whole = {
        "sources": len(summaries),
        "candidates": sum(s["candidates"] for s in summaries),
        "valid": sum(s["valid"] for s in summaries),
        "tasks": len(lines),
        "reasons": dict(reasons),
        "by_source": list(summaries),
    }
    write_json(out / "summary.json", whole)
    return whole


def table(out: Path, summaries: Sequence[dict[str, Any]]) -> str:
    """Candidates, valid ones and why the others fell out, by source, with the rate of valid ones per minute."""
    used = [reason for reason in validate.REASONS if any(s["reasons"].get(reason) for s in summaries)]
    header = ["source", "split", "candidates", "valid", *used, "minutes", "valid a minute"]
    rows = []
    total: Counter[str] = Counter()
    minutes = 0.0
    for s in summaries:
        spent = _minutes(shard(out, s["source"]) / "timing.json")
        minutes += spent
        total.update({"candidates": s["candidates"], "valid": s["valid"], **s["reasons"]})
        counts = [str(s["reasons"].get(reason, 0)) for reason in used]
        rows.append(
            [s["source"], s["split"], str(s["candidates"]), str(s["valid"]), *counts, *_rate(s["valid"], spent)]
        )
    counts = [str(total[reason]) for reason in used]
    rows.append(["all", "", str(total["candidates"]), str(total["valid"]), *counts, *_rate(total["valid"], minutes)])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _minutes(timing: Path) -> float:
    """What the sandbox took for a shard; nothing decides by it, so a damaged file counts as no time."""
    try:
        return float(read_json(timing)["seconds"]) / 60
    except (UsageError, KeyError, TypeError, ValueError):
        return 0.0


def _rate(valid: int, minutes: float) -> list[str]:
    return [f"{minutes:.1f}", f"{valid / minutes:.1f}" if minutes else "-"]
