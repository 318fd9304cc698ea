"""What a step of the recipe declares about itself: one frozen record, in the step's own package.

A package `stages/<name>/` has a module `stage` with `STAGES`, a tuple of these records, which `m1.run.registry` finds.
Order checks, plan, deployments, dvc.yaml, report and command line are derived from them: a new stage is a new folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from m1.config.base import Section
from m1.config.profile import Profile


class Kind(Enum):
    """What sort of work a stage does; the value is for people."""

    DATA = "data"  #: writes a data set, which DVC records
    TRAINING = "training"  #: leaves a checkpoint, from which the next training stage starts
    REINFORCEMENT = "reinforcement learning"  #: the same, from the model's own responses
    RESULT = "check and export"  #: reads checkpoints and leaves none that a later stage trains from


class Need(Enum):
    """What making or judging tasks may need besides this process; `infra.tools` provides it or says why not."""

    SANDBOX = "sandbox"  #: runs untrusted code
    JUDGE = "judge model"  #: reads answers that no rule can judge


@dataclass(frozen=True)
class Demand:
    """What a task family needs, and whether a run must stop where that is missing instead of leaving the family out."""

    need: Need
    required: bool = False


@dataclass(frozen=True)
class Cost:
    """What a stage is expected to process, by the profile.

    Attributes:
        tokens: read or generated; `bound` says that this is an upper bound.
        training_flops, rollout_flops: operations of passes that train or read, and of those that generate.
        steps: optimizer steps, in reinforcement learning batches of rollouts; None where there are none.
    """

    tokens: int
    training_flops: float = 0.0
    rollout_flops: float = 0.0
    bound: bool = False
    steps: int | None = None

    @property
    def flops(self) -> float:
        return self.training_flops + self.rollout_flops


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of one shape.

    Attributes:
        name: the stage, with a number where it has several shapes.
        sequence_length: tokens of a sequence.
        global_batch_size: sequences of a step over all data-parallel ranks.
        micro_batch_size: sequences of a micro-batch of one rank.
    """

    name: str
    stage: str
    sequence_length: int
    global_batch_size: int
    micro_batch_size: int


@dataclass(frozen=True)
class Origin:
    """A base model from elsewhere that a stage starts from: its folder, absolute, and the digest of its content."""

    folder: str
    digest: str


def _nothing(profile: Profile) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One step of the recipe.

    Attributes:
        name: as in the profile's order, where a section of this name belongs to it.
        about: one sentence for a reader who is new to the recipe.
        kind: what sort of work it does.
        section: type of its section.
        run: "package.module:function" that does the work. A data stage's takes (profile, empty folder) and returns
            a summary; any other takes a `StageContext` and returns a `StageResult`. Imported when it runs, not before.
        reads: data stages whose output it reads.
        unread: of these, what it does not read with this profile.
        settings: what of the profile decides its result besides its section: "seed", "model", "model.vocab_size".
        needs_checkpoint: whether training must come before it; if not, it takes a checkpoint where there is one.
        distributed: whether it runs on the profile's whole layout, under torchrun.
        after: stages that must come before it where both are in the order.
        compares_history: its result depends on every run upstream, not on the parent alone.
        rules: what of the profile makes it impossible, one clause each; checked when a profile is read.
        limits: what is possible, but not with this version of the program; checked before anything runs.
        cost: expected work; None where counting tokens makes no sense.
        steps: its optimizer steps by shape, for memory and layouts.
        files: files of the checkout that it reads besides data sets: specs.
        spec_paths: files or folders in which `files` lie, for any profile.
        plugins: modules it loads by name for this profile, whose code decides its result as its own does.
        loads: packages that plugins may lie in, for any profile.
        demands: task families it is asked for that need more than this process: family -> what.
        origin: base model that it starts from; the second argument is the folder of the profile's tokenizer if known.
    """

    name: str
    about: str
    kind: Kind
    section: type[Section]
    run: str
    reads: tuple[str, ...] = ()
    unread: Callable[[Profile], tuple[str, ...]] = _nothing
    settings: tuple[str, ...] = ()
    needs_checkpoint: bool = False
    distributed: bool = False
    after: tuple[str, ...] = ()
    compares_history: bool = False
    rules: Callable[[Profile], Iterable[str]] = _nothing
    limits: Callable[[Profile], Iterable[str]] = _nothing
    cost: Callable[[Profile], Cost | None] = lambda profile: None
    steps: Callable[[Profile], tuple[Steps, ...]] = lambda profile: ()
    files: Callable[[Profile], tuple[Path, ...]] = lambda profile: ()
    spec_paths: tuple[str, ...] = ()
    plugins: Callable[[Profile], tuple[str, ...]] = _nothing
    loads: tuple[str, ...] = ()
    demands: Callable[[Profile], Mapping[str, Demand]] = lambda profile: {}
    origin: Callable[[Profile, Path | None], Origin | None] = lambda profile, tokenizer: None

    @property
    def module(self) -> str:
        """The module that does the work."""
        return self.run.partition(":")[0]

    @property
    def package(self) -> str:
        """What `python -m` runs."""
        return self.module.rpartition(".")[0]

    def reads_of(self, profile: Profile) -> tuple[str, ...]:
        """Data stages whose output it reads with this profile."""
        return tuple(name for name in self.reads if name not in self.unread(profile))

    @property
    def makes_data(self) -> bool:
        return self.kind is Kind.DATA

    @property
    def trains(self) -> bool:
        """Whether it leaves a checkpoint that later stages start from."""
        return self.kind in (Kind.TRAINING, Kind.REINFORCEMENT)
