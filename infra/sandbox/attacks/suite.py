"""Run attacks against an engine, one after another, each followed by a job that is known to be good."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from infra.sandbox.attacks import forgeries, jobs, texts, written
from infra.sandbox.runner import Sandbox
from m1.errors import M1Error, UsageError
from m1.tasks.sandbox import Job, Kind, Limits
from m1.tasks.swe.patches import make_diff
from m1.tasks.swe.reward import LIMITS as JUDGING
from m1.tasks.swe.reward import Judgement, engine_is_well, judge_repair, judge_test

#: Small enough that every limit is met within seconds, large enough for pytest.
LIMITS = Limits(memory_mb=256, pids=64, file_mb=8, work_mb=64, output_kb=64, seconds=5.0)
GROUPS = ("job", "text", "forgery", "written-test", "informed")


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        group: one of GROUPS; an `informed` attack is written against this very program, and may win.
        run: what it came to: whether it was contained, and the verdict in words.
    """

    group: str
    name: str
    run: Callable[[Sandbox], tuple[bool, str]]


@dataclass(frozen=True)
class Finding:
    """What an attack came to.

    Attributes:
        seconds: wall time until the verdict, the sandbox's work included.
        next_job: whether a job that is known to be good passed afterwards.
    """

    attack: Attack
    contained: bool
    verdict: str
    seconds: float
    next_job: bool


def attacks(groups: Sequence[str] = GROUPS) -> list[Attack]:
    """All attacks of these groups."""
    made = [Attack("job", name, _job(program)) for name, program in jobs.PROGRAMS.items()]
    made += [Attack("text", name, _repair(text)) for name, text in texts.HOSTILE.items()]
    made += [Attack("forgery", name, _repair(forgeries.answer(code))) for name, code in forgeries.FORGERIES.items()]
    made.append(Attack("forgery", "files that steer pytest or Python", _repair(steering())))
    made += [Attack("written-test", name, _written(text)) for name, text in written.WRITTEN.items()]
    made += [Attack("informed", name, _repair(forgeries.answer(code))) for name, code in forgeries.INFORMED.items()]
    made += [Attack("informed", name, _written(text)) for name, text in written.INFORMED.items()]
    return [attack for attack in made if attack.group in groups]


def steering() -> str:
    """One answer with every file that would steer pytest or Python."""
    files = {path: content.encode() for path, content in forgeries.STEERING.items()}
    return make_diff(forgeries.FAULTY, {**forgeries.FAULTY, **files, "solution.py": b"import evil\n" + _wrong()})


def _wrong() -> bytes:
    return forgeries.WRONG.encode()


def chosen(groups: Sequence[str] | None = None, word: str = "") -> list[Attack]:
    """Attacks of these groups, all by default, with this word in their name.

    Raises:
        UsageError: there is no such group, or no such attack.
    """
    unknown = sorted(set(groups or ()) - set(GROUPS))
    if unknown:
        raise UsageError(f"group {unknown[0]!r}: there is no such group of attacks", f"Give {', '.join(GROUPS)}.")
    found = [attack for attack in attacks(groups or GROUPS) if word in attack.name]
    if not found:
        raise UsageError(f"no attack has {word!r} in its name", "Leave out --name to see all.")
    return found


def finding(sandbox: Sandbox, attack: Attack) -> Finding:
    """Run an attack, and then a job that is known to be good."""
    started = time.monotonic()
    try:
        contained, verdict = attack.run(sandbox)
    except M1Error as error:  # an answer that makes the judge raise has excused itself
        contained, verdict = False, f"raised: {error.what}"
    seconds = time.monotonic() - started
    return Finding(attack, contained, verdict, seconds, engine_is_well(sandbox, LIMITS))


def honest(sandbox: Sandbox) -> list[str]:
    """What goes wrong with answers that are right; empty on a good engine. A judge that refuses all contains all."""
    right = make_diff(forgeries.FAULTY, forgeries.GOLD)
    wrong = make_diff(forgeries.FAULTY, {**forgeries.FAULTY, "solution.py": b"# tried\n" + _wrong()})
    found = {
        "a right repair": (_judged(sandbox, right), "resolved"),
        "a wrong repair": (_judged(sandbox, wrong), "unresolved"),
        "a test that finds the fault": (_test(sandbox, written.GOOD), "resolved"),
    }
    return [
        f"{name}: {judged.end.value}: {judged.message}"
        for name, (judged, end) in found.items()
        if judged.end.value != end
    ]


def _job(program: jobs.Program) -> Callable[[Sandbox], tuple[bool, str]]:
    def run(sandbox: Sandbox) -> tuple[bool, str]:
        result = sandbox.run(Job({"attack.py": program.code}, ["python3", "attack.py"], LIMITS))
        good = result.kind in program.kinds and program.output in (None, result.output)
        shown = result.output.strip().splitlines()[:1] if program.output == "" and result.output else []
        return good and result.kind is not Kind.INFRASTRUCTURE, " ".join([result.kind.value, *shown])

    return run


def _judged(sandbox: Sandbox, answer: str) -> Judgement:
    limits = replace(LIMITS, seconds=JUDGING.seconds / 5)
    return judge_repair(sandbox, forgeries.TASK, forgeries.FAULTY, forgeries.KEPT, answer, limits=limits)


def _test(sandbox: Sandbox, answer: str) -> Judgement:
    limits = replace(LIMITS, seconds=JUDGING.seconds / 5)
    return judge_test(sandbox, forgeries.FAULTY, forgeries.GOLD, answer, limits=limits)


def _repair(answer: str) -> Callable[[Sandbox], tuple[bool, str]]:
    def run(sandbox: Sandbox) -> tuple[bool, str]:
        return _shown(_judged(sandbox, answer))

    return run


def _written(answer: str) -> Callable[[Sandbox], tuple[bool, str]]:
    def run(sandbox: Sandbox) -> tuple[bool, str]:
        return _shown(_test(sandbox, answer))

    return run


def _shown(judged: Judgement) -> tuple[bool, str]:
    return judged.value == 0.0 and not judged.resolved, f"{judged.end.value}: {judged.message}".removesuffix(": ")
