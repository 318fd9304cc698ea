"""Software-engineering tasks put to the model, their answers judged in the sandbox: for rewards and for evaluation.

Every rank has a sandbox of its own and judges the answers of its own prompts there. What the sandbox itself fails on is
`UNJUDGED`: neither right nor wrong, and left out by whoever counts.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed

from infra.sandbox import Limits, Sandbox
from infra.sandbox.images import build_environment
from m1 import chat
from m1.errors import M1Error, UsageError
from m1.generation import Rollout, gather_shares, share_of_rank
from m1.model.decoder import Decoder
from m1.profile import SwePrompts
from m1.stage import StageContext
from m1.tokenizer import Tokenizer
from m1.training.stopping import StopRequest, StopRequested
from stages.evaluate.pass_rate import sample
from stages.evaluate.prompts import Prompt, read_prompts
from stages.swe.reward import LIMITS, End, judge
from stages.swe.tasks import TaskSet

#: A response without an answer block; it never reaches the sandbox.
NO_ANSWER = "no-answer"
#: The sandbox failed; not an end of the answer.
UNJUDGED = "unjudged"
ENDS = (*(end.value for end in End), NO_ANSWER)
#: Seconds between two looks for a request to stop.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Verdict:
    """How a response ended.

    Attributes:
        end: one of `ENDS`, or `UNJUDGED`.
        value: what `stages.swe.reward` gives: 1 for resolved, the overlap for localisation; of no meaning if unjudged.
        formatted: one think block, then one answer block.
    """

    end: str
    value: float
    formatted: bool
    message: str = ""

    @property
    def judged(self) -> bool:
        return self.end != UNJUDGED

    @property
    def resolved(self) -> bool:
        return self.end == End.RESOLVED.value


class Judge:
    """Judges responses to the tasks of one set, `workers` of them at a time.

    Args:
        sandboxes: by the name of the tasks' environment.
        limits: of one run of tests.
    """

    def __init__(self, tasks: TaskSet, sandboxes: Mapping[str, Sandbox], workers: int, limits: Limits = LIMITS) -> None:
        self._tasks, self._sandboxes = tasks, sandboxes
        self._workers, self._limits = workers, limits
        self._by_id = {task.id: task for task in tasks.tasks}

    def judge(self, asked: Sequence[tuple[Mapping[str, Any], str]], stop: StopRequest | None = None) -> list[Verdict]:
        """Verdicts on (row of the task, response), in order; equal responses to a task are judged once.

        Args:
            stop: once it is requested, judging is abandoned; all ranks take part.

        Raises:
            StopRequested: on every rank.
            UsageError: the set is not complete.
        """
        keys = [(row["state"]["task"], text) for row, text in asked]
        threads = ThreadPoolExecutor(self._workers, thread_name_prefix="swe-judge")
        found = {key: threads.submit(self._one, *key) for key in dict.fromkeys(keys)}
        waiting = set(found.values())
        try:
            while waiting and not (stop is not None and stop.noticed()):
                _, waiting = wait(waiting, timeout=_LOOK_SECONDS)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        if stop is not None and stop.agreed():
            raise StopRequested
        return [found[key].result() for key in keys]

    def _one(self, task_id: str, response: str) -> Verdict:
        parsed = chat.parse_response(response)
        if parsed is None:
            return Verdict(NO_ANSWER, 0.0, False)
        task = self._by_id[task_id]
        try:
            judged = judge(self._sandboxes[task.environment], self._tasks, task, parsed[1], limits=self._limits)
        except UsageError:
            raise
        except M1Error as error:
            return Verdict(UNJUDGED, math.nan, True, error.what)
        return Verdict(judged.end.value, judged.value, True, judged.message)


@dataclass
class Answered:
    """A task with its sampled responses."""

    row: dict[str, Any]
    texts: list[str]
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def kind(self) -> str:
        return self.row["task"].removeprefix("swe-")

    @property
    def correct(self) -> list[bool | None]:
        """None where the sandbox failed."""
        return [verdict.resolved if verdict.judged else None for verdict in self.verdicts]


@dataclass(frozen=True)
class Swe:
    """What a stage asks, and who judges the answers."""

    prompts: list[Prompt]
    judge: Judge

    def evaluate(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: str,
    ) -> list[Answered]:
        """Sample and judge responses; the data-parallel ranks share the prompts and all return all, in order."""
        mine = share_of_rank(prompts)
        responses = sample(
            decoder, tokenizer, mine, samples, seed,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        )  # fmt: skip
        texts = [[tokenizer.decode(rollout.tokens) for rollout in rollouts] for rollouts in responses]
        pairs = [(prompt.row, text) for prompt, group in zip(mine, texts, strict=True) for text in group]
        verdicts = iter(self.judge.judge(pairs))
        answered = [
            Answered(prompt.row, group, rollouts, [next(verdicts) for _ in group])
            for prompt, group, rollouts in zip(mine, texts, responses, strict=True)
        ]
        return gather_shares(answered, len(prompts))


@contextlib.contextmanager
def opened(context: StageContext, split: str, tokenizer: Tokenizer) -> Iterator[tuple[Swe | None, list[str]]]:
    """Prompts of a split with their judge, and sentences for the report; None where there is no engine or no set, which
    the sentences then say. No container is left behind, whatever happens.

    Every rank takes part, in a process group.

    Raises:
        UsageError: no prompt fits.
        ServiceError: there was an engine when the stage was planned, and it does not do its work now.
    """
    part: SwePrompts = context.section.swe
    file = context.data["synthesize"] / f"swe-{split}.jsonl"
    skipped = ""
    if not context.request.engine:
        skipped = "no engine; infra/sandbox/engine.sh starts one"
    elif not file.is_file():
        skipped = "synthesize left the tasks out, as it had no engine; run it again"
    elif not (rows := len(file.read_text().splitlines())):
        skipped = f"the set has no task of the {split} split; synthesize.swe.packages names its packages"
    if skipped:
        sentence = f"swe: skipped: {skipped}"
        if context.rank == 0:
            print(f"{context.stage}: {sentence}", flush=True)
        yield None, [sentence]
        return
    prompts = read_prompts(file, tokenizer, part.max_prompt_length)
    random.Random(f"{context.profile.seed}/swe").shuffle(prompts)  # the file has one package after the other
    sentence = f"swe: {len(prompts)} of {rows} prompts have at most {part.max_prompt_length} tokens"
    tasks = TaskSet(context.data["synthesize"] / "swe")
    limits = replace(LIMITS, seconds=part.test_seconds)
    with contextlib.ExitStack() as stack:
        images = _images(context, tasks)
        made = {
            name: stack.enter_context(Sandbox(image, warm=part.workers, limits=limits))
            for name, image in images.items()
        }
        yield Swe(prompts, Judge(tasks, made, part.workers, limits)), [sentence]


def _images(context: StageContext, tasks: TaskSet) -> dict[str, str]:
    """Images by environment, made by rank 0 where they are missing, so that no two ranks do the same work."""
    if context.rank != 0:
        torch.distributed.barrier()
    names = {task.environment for task in tasks.tasks}
    images = {name: build_environment(name, tasks.environments[name]) for name in sorted(names)}
    if context.rank == 0:
        torch.distributed.barrier()
    return images
