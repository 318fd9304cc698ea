"""Object counting: how many things of one kind are left after a story of gains and losses."""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task, parse_integer

KINDS = ("key", "file", "list", "code", "name", "line", "type", "point", "field", "node")


def _level(events: int, kinds: int, words: int, targets: int, most: int, high: int) -> Knobs:
    return {"events": events, "kinds": kinds, "words": words, "targets": targets, "most": most, "high": high}


class ObjectCounting(Task):
    """Each event adds or removes some things of one kind.

    Knobs: number of `events` over `kinds` of things, out of the first `words` of the vocabulary; `targets` kinds are
    counted together; an event moves at most `most` things; no kind ever has fewer than none, and the total at the end
    is at most `high`.
    """

    name = "object_counting"
    about = "Count the things of some kinds after a story of gains and losses."
    answer_format = "an integer"
    templates = ("How many {}", "Count {}")
    levels = (
        _level(3, 2, 4, 1, 4, 9),
        _level(4, 2, 4, 1, 5, 9),
        _level(5, 2, 10, 1, 9, 20),
        _level(6, 3, 10, 2, 9, 99),
        _level(8, 3, 10, 2, 29, 199),
        _level(12, 4, 10, 3, 49, 299),
        _level(18, 5, 10, 3, 60, 499),
        _level(24, 6, 10, 3, 60, 999),
        _level(32, 6, 10, 4, 60, 999),
        _level(40, 8, 10, 4, 60, 1999),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        while True:
            kinds = rng.sample(KINDS[: knobs["words"]], knobs["kinds"])
            targets = kinds[: knobs["targets"]]
            held = dict.fromkeys(kinds, 0)
            events = []
            for _ in range(knobs["events"]):
                kind = rng.choice(kinds)
                change = rng.randint(1, knobs["most"])
                if rng.random() < 0.5 and held[kind]:
                    change = -rng.randint(1, min(held[kind], knobs["most"]))
                held[kind] += change
                events.append([kind, change])
            counted = [kind in targets for kind, _ in events]
            total = sum(held[kind] for kind in targets)
            if sum(counted) >= 2 and not all(counted) and total <= knobs["high"]:
                return {"targets": targets, "events": events}

    def describe(self, state: State) -> str:
        events = " ".join(f"{kind}{change:+d}" for kind, change in state["events"])
        return f"{' and '.join(state['targets'])}? {events}"

    def solve(self, state: State) -> tuple[str, str]:
        total, steps = 0, []
        for kind, change in state["events"]:
            if kind in state["targets"]:
                total += change
                steps.append(f"{kind}{change:+d}={total}")
            else:
                steps.append(f"{kind}{change:+d} no")
        return " ".join(steps), str(total)

    def parse(self, answer: str) -> Any | None:
        return parse_integer(answer)


TASK = ObjectCounting()
