"""Goods exchange: people swap what they hold; who holds what at the end?"""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task, split_symbols

PEOPLE = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GOODS = "abcdefghijklmnopqrstuvwxyz"


def _level(people: int, swaps: int, goods: int) -> Knobs:
    return {"people": people, "swaps": swaps, "goods": goods}


class GoodsExchange(Task):
    """Every person holds one thing; each step two people swap.

    Things are lower-case letters, drawn from the first `goods` of the alphabet. Knobs besides: number of `people` and
    of `swaps`.
    """

    name = "goods_exchange"
    about = "Track who holds what while people swap."
    answer_format = "every person followed by the thing held, in any order of people"
    templates = ("Who has what? {}", "Find the end state. {}")
    levels = (
        _level(3, 2, 10),
        _level(3, 3, 10),
        _level(3, 4, 26),
        _level(4, 5, 26),
        _level(5, 7, 26),
        _level(7, 10, 26),
        _level(9, 16, 26),
        _level(12, 24, 26),
        _level(16, 40, 26),
        _level(20, 60, 26),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        people = PEOPLE[: knobs["people"]]
        goods = rng.sample(GOODS[: knobs["goods"]], knobs["people"])
        swaps: list[str] = []
        while len(swaps) < knobs["swaps"]:
            swap = "".join(sorted(rng.sample(people, 2)))
            if swaps[-1:] != [swap]:  # the same swap twice in a row would undo itself
                swaps.append(swap)
        return {"people": people, "goods": goods, "swaps": swaps}

    def describe(self, state: State) -> str:
        return f"{_holding(state['people'], state['goods'])}. Swap " + ", ".join(f"{a} {b}" for a, b in state["swaps"])

    def solve(self, state: State) -> tuple[str, str]:
        held = dict(zip(state["people"], state["goods"]))
        steps = [_holding(held, held.values())]  # so that every swap reads the state just before it
        for first, second in state["swaps"]:
            held[first], held[second] = held[second], held[first]
            steps.append(f"{first} {second}: {_holding(held, held.values())}")
        return "; ".join(steps), _holding(held, held.values())

    def parse(self, answer: str) -> Any | None:
        symbols = split_symbols(answer)
        people, goods = symbols[::2], symbols[1::2]
        if len(people) != len(goods) or not people or len(set(people)) != len(people):
            return None
        return dict(zip(people, goods))


def _holding(people: Any, goods: Any) -> str:
    return " ".join(f"{person} {thing}" for person, thing in zip(people, goods))


TASK = GoodsExchange()
