"""The contract of a stage: what it is given, what it leaves behind, and when its work need not be done again.

A data stage writes `data/<profile>/<stage>`; DVC records it. Every other stage writes a run folder
`runs/<profile>/<stage>/<fingerprint>`, which is complete if and only if it holds `result.json` (written last,
atomically). The fingerprint covers the stage's code, its sections of the profile, the data it reads and the run it
starts from, so an unchanged stage is recognised and a changed one never overwrites the evidence of the old.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from m1 import interchange, paths, profile
from m1.errors import Checkpointed, M1Error, ServiceError, UsageError
from m1.profile import DATA_STAGES, READS, TRAINING_STAGES, Profile

RESULT = "result.json"
REQUEST = "request.json"
#: Left by a stage that SIGTERM ended after a checkpoint; gone as soon as the stage is started again.
INTERRUPTION = "interrupted.json"
#: Environment of processes that train: the allocator keeps freed memory. Given back and fetched anew at every step,
#: tens of megabytes a time, it costs a tenth of a step in page faults.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}


@dataclass(frozen=True)
class StageInfo:
    """Static facts of one stage.

    Attributes:
        module: what `python -m` runs.
        code: files and packages, relative to the checkout, whose source is part of the fingerprint.
        sections: profile sections that are part of the fingerprint.
        distributed: whether it runs under torchrun with the profile's world size.
    """

    module: str
    code: tuple[str, ...]
    sections: tuple[str, ...]
    distributed: bool = False


_MODEL_CODE = ("kernels", "m1/model", "m1/training")
_GENERATE = ("stages/synthesize/rewards.py", "stages/synthesize/tasks", "m1/chat.py", "m1/generation.py", *_MODEL_CODE)
_RL = ("stages/rl", "stages/evaluate/pass_rate.py", "stages/evaluate/prompts.py", *_GENERATE)
#: Part of the fingerprint of a stage whose section asks for software-engineering tasks.
_SWE = ("stages/evaluate/swe.py", "stages/swe", "infra/sandbox")
STAGE_INFO: dict[str, StageInfo] = {
    "corpus": StageInfo("stages.corpus", ("stages/corpus",), ("corpus",)),
    "tokenizer": StageInfo("stages.tokenizer", ("stages/tokenizer", "m1/chat.py"), ("tokenizer", "model")),
    "tokens": StageInfo("stages.tokens", ("stages/tokens",), ("tokens",)),
    "sft-data": StageInfo(
        "stages.sft_data", ("stages/sft_data", "stages/synthesize/tasks", "m1/chat.py"), ("sft-data",)
    ),
    "synthesize": StageInfo(
        "stages.synthesize", ("stages/synthesize", "stages/swe", "infra/sandbox", "m1/chat.py"), ("synthesize",)
    ),
    "pretrain": StageInfo(
        "stages.pretrain",
        ("stages/pretrain", "m1/interchange.py", *_MODEL_CODE),
        ("pretrain", "model", "parallel"),
        True,
    ),
    "sft": StageInfo("stages.sft", ("stages/sft", "m1/chat.py", *_MODEL_CODE), ("sft", "model", "parallel"), True),
    "context-extension": StageInfo(
        "stages.context_extension",
        ("stages/context_extension", "m1/chat.py", *_MODEL_CODE),
        ("context-extension", "model", "parallel"),
        True,
    ),
    "rl-40k": StageInfo("stages.rl", _RL, ("rl-40k", "model", "parallel"), True),
    "rl-80k": StageInfo("stages.rl", _RL, ("rl-80k", "model", "parallel"), True),
    "evaluate": StageInfo(
        "stages.evaluate",
        ("stages/evaluate", *_GENERATE),
        ("evaluate", "model", "parallel"),
        True,
    ),
    "export": StageInfo(
        "stages.export", ("stages/export", "m1/chat.py", "m1/interchange.py", *_MODEL_CODE), ("export", "model")
    ),
}


@dataclass(frozen=True)
class StageRequest:
    """Everything one execution of a stage is given. Plain values: it is written to `request.json` in the run folder.

    Attributes:
        profile: the resolved profile as plain values.
        fingerprint: 64 hex digits.
        output: run folder, absolute.
        data: data stage -> its folder, absolute.
        data_digests: data stage -> hash in dvc.lock.
        parent: run folder of the training stage it starts from, or None.
        parent_stage: name of that stage, or None.
        history: every training run upstream of this one, oldest first, as [stage, run folder].
        resume: run folder of the same stage at another parallel layout, whose newest checkpoint is continued as long
            as this run has none of its own.
        init_from: "folder" (absolute) and "digest" of the base model that it starts from, or None.
        engine: whether a Docker engine is there for the software-engineering tasks that the section asks for; None
            where it asks for none.
    """

    stage: str
    profile: dict[str, Any]
    fingerprint: str
    output: str
    data: dict[str, str]
    data_digests: dict[str, str]
    parent: str | None = None
    parent_stage: str | None = None
    history: list[list[str]] = field(default_factory=list)
    resume: str | None = None
    init_from: dict[str, str] | None = None
    engine: bool | None = None

    def load_profile(self) -> Profile:
        return profile.parse(self.profile, "request")


@dataclass
class StageResult:
    """What a complete stage leaves behind, as `result.json` in its run folder.

    Attributes:
        checkpoint: folder of the final checkpoint relative to the run folder, or None.
        key_metric: name of the metric shown in the summary table.
        before, after: that metric before and after the stage; None where it has no such value.
        metrics: final scalar metrics.
        figures: image files relative to the run folder.
        notes: sentences for the report: what was unusual, what was skipped and why.
        left_out: of the notes, those on a part of the stage that could not be done, for want of an engine say.
    """

    stage: str
    fingerprint: str
    request: dict[str, Any]
    checkpoint: str | None
    key_metric: str
    before: float | None
    after: float | None
    metrics: dict[str, float]
    figures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0
    finished_at: float = 0.0


class StageContext:
    """Handed to a stage's `run` function: its inputs, its output folder, its metrics log and its progress.

    Only rank 0 writes files; `log_metrics` and `progress` do nothing on other ranks.
    """

    def __init__(self, request: StageRequest) -> None:
        self.request = request
        self.stage = request.stage
        self.profile = request.load_profile()
        self.output = Path(request.output)
        self.parent = Path(request.parent) if request.parent else None
        self.data = {name: Path(folder) for name, folder in request.data.items()}
        self.rank = int(os.environ.get("RANK", "0"))
        self._started = time.time()
        if self.rank == 0:
            self.output.mkdir(parents=True, exist_ok=True)

    @property
    def section(self) -> Any:
        return self.profile.section(self.stage)

    def parent_checkpoint(self) -> Path:
        """Folder of the parent's final checkpoint."""
        assert self.parent is not None
        return checkpoint_of(self.parent)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line to `metrics.jsonl`; the flow forwards it to MLflow. Keys like "train/loss"."""
        if self.rank == 0:
            self._append({"step": int(step), "time": time.time(), "metrics": {k: float(v) for k, v in metrics.items()}})

    def progress(self, done: float, total: float, text: str = "") -> None:
        """Report progress; `text` is a short remark such as the current loss."""
        if self.rank == 0:
            self._append({"time": time.time(), "progress": {"done": done, "total": total, "text": text}})

    def write_interruption(self, step: int, checkpoint: Path) -> None:
        """Leave word that the stage was stopped after `step` and where it will go on."""
        if self.rank == 0:
            write_json(
                self.output / INTERRUPTION,
                {"step": step, "checkpoint": str(checkpoint.relative_to(self.output)), "time": time.time()},
            )

    def figures_dir(self) -> Path:
        folder = self.output / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every metrics line so far, for figures; a step logged twice (after a resume) keeps the later line."""
        return read_metrics(self.output)

    def _append(self, line: dict[str, Any]) -> None:
        with open(self.output / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def finish(
        self,
        *,
        checkpoint: Path | None,
        key_metric: str,
        before: float | None,
        after: float | None,
        metrics: dict[str, float],
        figures: list[Path] | None = None,
        notes: list[str] | None = None,
        left_out: list[str] | None = None,
    ) -> StageResult:
        """Write `result.json`: from here on the run folder is complete."""
        result = StageResult(
            stage=self.stage,
            fingerprint=self.request.fingerprint,
            request=asdict(self.request),
            checkpoint=str(checkpoint.relative_to(self.output)) if checkpoint else None,
            key_metric=key_metric,
            before=before,
            after=after,
            metrics={k: float(v) for k, v in metrics.items()},
            figures=[str(f.relative_to(self.output)) for f in figures or []],
            notes=notes or [],
            left_out=left_out or [],
            seconds=time.time() - self._started,
            finished_at=time.time(),
        )
        if self.rank == 0:
            write_json(self.output / RESULT, asdict(result))
        return result


def write_json(path: Path, content: Any) -> None:
    """Write atomically: the file is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Metrics lines of a run folder in order of step, the last of each (step, key set)."""
    file = run / "metrics.jsonl"
    lines: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}
    if file.exists():
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue  # a line cut by a kill
            if "metrics" in line:
                lines[line["step"], tuple(sorted(line["metrics"]))] = line
    return [lines[key] for key in sorted(lines)]


def load_result(run: Path) -> StageResult | None:
    """The result of a run folder, or None if the run is not complete."""
    file = run / RESULT
    if not file.is_file():
        return None
    try:
        return StageResult(**json.loads(file.read_text()))
    except (json.JSONDecodeError, TypeError) as error:
        raise UsageError(f"{file} is damaged ({error})", f"Remove {run} and rerun the stage.") from error


def interruption(request: StageRequest, since: float = 0.0) -> Checkpointed | None:
    """How the last execution ended, if SIGTERM ended it after a checkpoint, `since` that time."""
    try:
        left = json.loads((Path(request.output) / INTERRUPTION).read_text())
    except OSError:
        return None
    if left["time"] < since:
        return None
    return Checkpointed.after(request.stage, left["step"], Path(request.output) / left["checkpoint"])


def checkpoint_of(run: Path) -> Path:
    """Final checkpoint of a complete run folder."""
    result = load_result(run)
    if result is None or result.checkpoint is None:
        raise UsageError(f"{run} holds no finished checkpoint", "Run the stage that makes it, or name another run.")
    return run / result.checkpoint


def newest_run(profile_name: str, stage: str) -> Path | None:
    """Run folder of `stage` that finished last, or None."""
    folder = paths.runs_dir(profile_name, stage)
    finished = [(r.finished_at, run) for run in sorted(folder.glob("*")) if (r := load_result(run)) is not None]
    return max(finished)[1] if finished else None


def data_digest(profile_name: str, stage: str) -> str | None:
    """Hash of a data stage's output as DVC recorded it in dvc.lock, or None."""
    lock = paths.ROOT / "dvc.lock"
    if not lock.is_file():
        return None
    entry = (yaml.safe_load(lock.read_text()) or {}).get("stages", {}).get(f"{stage}@{profile_name}")
    return entry["outs"][0].get("md5") if entry and entry.get("outs") else None


def code_digest(entries: tuple[str, ...]) -> str:
    """Hash of Python sources (their syntax trees without docstrings, so comments do not count) and other files."""
    digest = hashlib.sha256()
    for entry in entries:
        root = paths.ROOT / entry
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            if "__pycache__" in file.parts or not file.exists():
                continue
            digest.update(str(file.relative_to(paths.ROOT)).encode())
            digest.update(_source(file))
    return digest.hexdigest()


def _source(file: Path) -> bytes:
    if file.suffix != ".py":
        return file.read_bytes()
    status = file.stat()
    return _syntax(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _syntax(file: Path, modified_ns: int, size: int) -> bytes:
    """Several stages share most of their code; a plan would parse it a dozen times."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
            node.body = node.body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


def fingerprint(
    stage: str,
    settings: Profile,
    data_digests: dict[str, str],
    parent: str | None,
    history: list[str],
    init_from: str | None = None,
    engine: bool | None = None,
) -> str:
    """Identity of one execution: code, settings, data, upstream fingerprints, base model, engine. 64 hex digits."""
    info = STAGE_INFO[stage]
    values = settings.to_dict()
    identity = {
        "stage": stage,
        "code": code_digest(code_of(stage, settings)),
        "sections": {name: values[name] for name in info.sections},
        "seed": settings.seed,
        "data": dict(sorted(data_digests.items())),
        "parent": parent,
        "history": history if stage == "evaluate" else [],
        **({"init_from": init_from} if init_from else {}),
        **({"engine": engine} if engine is not None else {}),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def asks_for_swe(stage: str, settings: Profile) -> bool:
    """Whether the stage's section asks for software-engineering tasks, which need the sandbox."""
    return getattr(settings.section(stage), "swe", None) is not None


def code_of(stage: str, settings: Profile) -> tuple[str, ...]:
    """Files and packages that decide what the stage does with these settings."""
    return (*STAGE_INFO[stage].code, *(_SWE if asks_for_swe(stage, settings) else ()))


def resolve(stage: str, settings: Profile, *, parent: Path | None = None) -> StageRequest:
    """Inputs of `stage`: the recorded data and the parent run.

    Args:
        parent: run folder to start from; by default the newest finished run of the stage that precedes in the order.

    Raises:
        UsageError: data or a parent is missing, with the command that makes it.
    """
    assert stage not in DATA_STAGES, "data stages are run by their dvc.yaml command"
    digests: dict[str, str] = {}
    for name in READS[stage]:
        digest = data_digest(settings.name, name)
        if digest is None or not paths.data_dir(settings.name, name).exists():
            raise UsageError(
                f"{stage}: the data set {name} of profile {settings.name} is not there",
                f"Make it with `prefect deployment run m1/{name}` or `dvc repro {name}@{settings.name}`.",
            )
        digests[name] = digest
    parent_stage = settings.parent_of(stage)
    if parent is None and parent_stage is not None:
        parent = newest_run(settings.name, parent_stage)
        if parent is None:
            raise UsageError(
                f"{stage}: no finished run of {parent_stage}, which it starts from",
                f"Run it first: `prefect deployment run m1/{parent_stage}`, or name one with upstream=<run>.",
            )
    parent_fingerprint, history = None, []
    if parent is not None:
        result = load_result(parent)
        if result is None or result.checkpoint is None:
            raise UsageError(f"{stage}: upstream run {parent} is not complete", "Rerun it, or name another run.")
        parent_fingerprint, parent_stage = result.fingerprint, result.stage
        history = [*result.request["history"], [result.stage, str(parent)]]
    base = base_model(stage, settings, paths.data_dir(settings.name, "tokenizer"))
    names = [Path(folder).name for _, folder in history]

    def folder(engine: bool | None) -> tuple[str, Path]:
        digest = base["digest"] if base else None
        identity = fingerprint(stage, settings, digests, parent_fingerprint, names, digest, engine)
        return identity, paths.runs_dir(settings.name, stage) / identity[:16]

    engine = None
    if asks_for_swe(stage, settings):
        # A run that is complete needs no engine any more.
        engine = load_result(folder(True)[1]) is not None or engine_answers(stage, settings)
    identity, output = folder(engine)
    return StageRequest(
        stage=stage,
        profile=settings.to_dict(),
        fingerprint=identity,
        output=str(output),
        data={name: str(paths.data_dir(settings.name, name)) for name in READS[stage]},
        data_digests=digests,
        parent=str(parent) if parent else None,
        parent_stage=parent_stage if parent else None,
        history=history,
        init_from=base,
        engine=engine,
    )


def engine_answers(stage: str, settings: Profile) -> bool:
    """Whether the sandbox has an engine for the software-engineering tasks of the stage.

    Raises:
        ServiceError: it has none, and the profile does not want to go without.
    """
    from infra.sandbox import engine  # only for profiles that ask for it

    missing = engine.missing()
    if missing is None:
        return True
    assert settings.synthesize.swe is not None
    if settings.synthesize.swe.when_no_engine == "fail":
        raise ServiceError(f"{stage}: {missing.what}, and synthesize.swe.when_no_engine is fail", missing.mend)
    return False


def resumed(request: StageRequest, run: Path) -> StageRequest:
    """`request`, continuing the checkpoints of `run`: the same work at another parallel layout.

    Raises:
        UsageError: `run` is no run folder of this stage, or it differs in more than its layout.
    """
    try:
        other = StageRequest(**json.loads((run / REQUEST).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--resume {run} is not a run folder ({error})", "Name one below runs/.") from error
    names = [name for name in STAGE_INFO[request.stage].sections if name != "parallel"]
    facts: list[tuple[str, Any, Any]] = [
        ("stage", request.stage, other.stage),
        ("data", request.data_digests, other.data_digests),
    ]
    facts += [("upstream run", request.history, other.history), ("engine", request.engine, other.engine)]
    facts += [(name, request.profile[name], other.profile.get(name)) for name in [*names, "seed"]]
    different = [name for name, ours, theirs in facts if ours != theirs]
    if different:
        raise UsageError(
            f"--resume {run}: it differs from this run in {', '.join(different)}; only the parallel layout may differ",
            "Name another run, or leave --resume out.",
        )
    return dataclasses.replace(request, resume=str(run.resolve()))


def base_model(stage: str, settings: Profile, tokenizer: Path | None = None) -> dict[str, str] | None:
    """Folder and digest of the base model that the stage's section names, if it names one and it fits the profile.

    Args:
        tokenizer: folder of the profile's tokenizer, which the base model's must then equal.

    Raises:
        UsageError: it does not fit, or cannot be read.
    """
    named = getattr(settings.section(stage), "init_from", None)
    if named is None:
        return None
    folder = paths.ROOT / Path(named).expanduser()  # an absolute path stays as it is
    return {"folder": str(folder), "digest": interchange.inspect(folder, settings.model, tokenizer).digest}


def write_request(request: StageRequest, *, force: bool = False) -> Path:
    """Prepare the run folder; `force` discards what an earlier execution left there."""
    output = Path(request.output)
    if force and output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / INTERRUPTION).unlink(missing_ok=True)
    write_json(output / REQUEST, asdict(request))
    return output / REQUEST


def main(run: Callable[[StageContext], StageResult], argv: list[str] | None = None) -> None:
    """Entry point of every stage that writes a run folder: `python -m stages.<name>`.

    With `--request FILE` (what the flow and torchrun use) it executes that request in this process. Otherwise it
    resolves the inputs from `--profile` and, for a stage that trains, starts torchrun with the profile's world size.
    """
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--stage", choices=[s for s in STAGE_INFO if STAGE_INFO[s].module == _module_of(run)])
    parser.add_argument("--upstream", help="run folder to start from")
    parser.add_argument("--force", action="store_true", help="redo the work even if it is complete")
    parser.add_argument("--resume", help="unfinished run folder of this stage, at another parallel layout, to continue")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    try:
        if options.request:
            request = StageRequest(**json.loads(Path(options.request).read_text()))
            run(StageContext(request))
            return
        names = [s for s in STAGE_INFO if STAGE_INFO[s].module == _module_of(run)]
        stage = options.stage or names[0]
        settings = profile.load(options.profile)
        request = resolve(stage, settings, parent=Path(options.upstream) if options.upstream else None)
        if options.resume:
            request = resumed(request, Path(options.resume))
        from infra import launch  # the only place where a stage starts processes: its own, outside a flow

        launch.run_stage(request, force=options.force)
    except M1Error as error:
        if not isinstance(error, Checkpointed) or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {error}\n")  # in one piece: another rank may be saying the same
        raise SystemExit(error.exit_code) from None


def data_main(run: Callable[[Profile, Path], dict[str, Any]], argv: list[str] | None = None) -> None:
    """Entry point of every data stage: `python -m stages.<name> --profile <profile>`, the command in dvc.yaml.

    `run` writes into the empty folder it is given and returns a summary (plain values, the same on every run of the
    same inputs), stored as `summary.json`; in it "notes" and "left_out" are as in `StageResult`. The folder replaces
    `data/<profile>/<stage>` only once it is complete.
    """
    parser = argparse.ArgumentParser(description=sys.modules[run.__module__].__doc__)
    parser.add_argument("--profile", default="tiny")
    options = parser.parse_args(argv)
    stage = next(s for s in STAGE_INFO if STAGE_INFO[s].module == _module_of(run))
    try:
        settings = profile.load(options.profile)
        final = paths.data_dir(settings.name, stage)
        unfinished = final.with_name(f".{stage}.{os.getpid()}")
        for leftover in final.parent.glob(f".{stage}.*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        try:
            write_json(unfinished / "summary.json", run(settings, unfinished))
            if final.exists():
                shutil.rmtree(final)
            os.replace(unfinished, final)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        print(f"error: {stage}: {error}. Free disk space or correct the permissions, then rerun.", file=sys.stderr)
        raise SystemExit(M1Error.exit_code) from None
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _module_of(run: Callable[..., Any]) -> str:
    package = sys.modules[run.__module__].__package__ or ""
    return package


__all__ = [
    "STAGE_INFO",
    "TRAINING_STAGES",
    "StageContext",
    "StageInfo",
    "StageRequest",
    "StageResult",
    "asks_for_swe",
    "base_model",
    "checkpoint_of",
    "code_digest",
    "code_of",
    "data_digest",
    "data_main",
    "engine_answers",
    "fingerprint",
    "interruption",
    "load_result",
    "main",
    "newest_run",
    "read_metrics",
    "resolve",
    "resumed",
    "write_json",
    "write_request",
]
