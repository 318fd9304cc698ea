"""Web of lies: everybody either always lies or never does, and speaks about others. Who tells the truth?"""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import NONE, Knobs, State, Task, parse_set

#: Without T and F, which say whether a person is truthful.
NAMES = "ABCDEGHIJKLMNOPRSUVW"
WORDS = {True: "T", False: "F"}


def _level(people: int, names: int, chain: bool, shuffled: bool, pairs: float) -> Knobs:
    return {"people": people, "names": names, "chain": chain, "shuffled": shuffled, "pairs": pairs}


class WebOfLies(Task):
    """The kind of one person is given; every other one makes a single statement about people settled before.

    "A F": A lies. "B: A T": B says that A tells the truth. "C: A = B" and "C: A != B": C says that A and B are of
    the same kind, or not. The kinds follow one by one, so the solution is unique.

    Knobs: number of `people`, out of the first `names`; in a `chain` everybody speaks about the one before; statements
    are `shuffled` or in an order in which each can be settled at once; share of statements about `pairs`.
    """

    name = "web_of_lies"
    about = "Find everybody who tells the truth."
    answer_format = 'names of the truthful in any order, or "none"'
    templates = ("Who is T? {}", "Find the T ones. {}")
    levels = (
        _level(3, 9, True, False, 0.0),
        _level(4, 9, True, False, 0.0),
        _level(5, 20, True, False, 0.0),
        _level(6, 20, False, False, 0.0),
        _level(8, 20, False, True, 0.2),
        _level(10, 20, False, True, 0.3),
        _level(12, 20, False, True, 0.4),
        _level(14, 20, False, True, 0.5),
        _level(16, 20, False, True, 0.6),
        _level(18, 20, False, True, 0.7),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        names = rng.sample(NAMES[: knobs["names"]], knobs["people"])
        statements: list[list[Any]] = []
        for place in range(1, len(names)):
            about = [names[place - 1] if knobs["chain"] else rng.choice(names[:place])]
            if place > 1 and rng.random() < knobs["pairs"]:
                about = rng.sample(names[:place], 2)
            statements.append([names[place], about, rng.random() < 0.5])
        if knobs["shuffled"]:
            rng.shuffle(statements)
        return {"known": [names[0], rng.random() < 0.5], "statements": statements}

    def describe(self, state: State) -> str:
        name, truthful = state["known"]
        return "; ".join([f"{name} {WORDS[truthful]}", *(_text(*statement) for statement in state["statements"])])

    def solve(self, state: State) -> tuple[str, str]:
        name, truthful = state["known"]
        kinds = {name: truthful}
        steps = [f"{name} {WORDS[truthful]}"]
        waiting = list(state["statements"])
        while waiting:
            statement = next(s for s in waiting if all(person in kinds for person in s[1]))
            waiting.remove(statement)
            speaker, about, claim = statement
            facts = [kinds[person] for person in about]
            holds = (facts[0] if len(facts) == 1 else facts[0] == facts[1]) == claim
            kinds[speaker] = holds
            known = " ".join(f"{person} {WORDS[kinds[person]]}" for person in about)
            steps.append(f"{_text(*statement)}, {known}, {speaker} {WORDS[holds]}")
        true = [person for person in kinds if kinds[person]]
        return "; ".join(steps), " ".join(true) or NONE

    def parse(self, answer: str) -> Any | None:
        return parse_set(answer)


def _text(speaker: str, about: list[str], claim: bool) -> str:
    if len(about) == 1:
        return f"{speaker}: {about[0]} {WORDS[claim]}"
    return f"{speaker}: {about[0]} {'=' if claim else '!='} {about[1]}"


TASK = WebOfLies()
