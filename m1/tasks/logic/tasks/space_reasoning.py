"""Space reasoning: walk over a grid from place to place; where does the walk end?"""

from __future__ import annotations

import random
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task, split_symbols

#: Right, left, up, down.
DIRECTIONS = {"R": (1, 0), "L": (-1, 0), "U": (0, 1), "D": (0, -1)}
LABELS = "abcdefghijklmnopqrstuvwxyz"


def _level(places: int, moves: int, size: int, named_start: bool, longest: int) -> Knobs:
    return {"places": places, "moves": moves, "size": size, "named_start": named_start, "longest": longest}


class SpaceReasoning(Task):
    """Places have coordinates x,y; x grows to the right, y upwards.

    Knobs: number of `places` and of `moves`; coordinates run from 0 to `size` - 1; with `named_start` the start is
    given by its letter instead of its coordinates; a move is at most `longest` steps.
    """

    name = "space_reasoning"
    about = "Follow moves over a grid and name the place where they end."
    answer_format = "the letter of the place"
    templates = ("Where is the end? {}", "Find the end. {}")
    levels = (
        _level(3, 2, 5, False, 3),
        _level(4, 3, 6, False, 4),
        _level(6, 3, 10, False, 9),
        _level(8, 4, 10, True, 9),
        _level(10, 7, 20, True, 9),
        _level(12, 10, 30, True, 19),
        _level(14, 12, 40, True, 19),
        _level(16, 16, 50, True, 29),
        _level(20, 20, 99, True, 39),
        _level(26, 24, 99, True, 49),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        size = knobs["size"]
        x, y = start = rng.randrange(size), rng.randrange(size)
        moves: list[list[Any]] = []
        while len(moves) < knobs["moves"]:
            name = rng.choice([*DIRECTIONS])
            if moves and DIRECTIONS[moves[-1][0]][0] ** 2 == DIRECTIONS[name][0] ** 2:
                continue  # turn at every move, so that no move merges with the one before
            dx, dy = DIRECTIONS[name]
            room = {"R": size - 1 - x, "L": x, "U": size - 1 - y, "D": y}[name]
            if not room:
                continue
            distance = rng.randint(1, min(room, knobs["longest"]))
            x, y = x + dx * distance, y + dy * distance
            moves.append([name, distance])
        places = {start, (x, y)} if knobs["named_start"] else {(x, y)}
        while len(places) < knobs["places"]:
            # Half of the others share a coordinate with the end, so that one coordinate does not give it away.
            other = [rng.randrange(size), rng.randrange(size)]
            if rng.random() < 0.5:
                other[rng.randrange(2)] = (x, y)[rng.randrange(2)]
            places.add((other[0], other[1]))
        order = sorted(places)
        rng.shuffle(order)
        return {
            "places": [list(place) for place in order],
            "start": list(start),
            "named_start": knobs["named_start"],
            "moves": moves,
        }

    def describe(self, state: State) -> str:
        places = " ".join(f"{x},{y} {label}" for (x, y), label in zip(state["places"], LABELS))
        x, y = state["start"]
        start = LABELS[state["places"].index(state["start"])] if state["named_start"] else f"{x},{y}"
        moves = " ".join(f"{name}{distance}" for name, distance in state["moves"])
        return f"{places}. From {start} {moves}"

    def solve(self, state: State) -> tuple[str, str]:
        x, y = state["start"]
        trace = f"{x},{y}"
        for name, distance in state["moves"]:
            dx, dy = DIRECTIONS[name]
            x, y = x + dx * distance, y + dy * distance
            trace += f" {name}{distance}:{x},{y}"
        label = LABELS[state["places"].index([x, y])]
        return f"{trace} {label}", label

    def parse(self, answer: str) -> Any | None:
        symbols = split_symbols(answer)
        return symbols[0] if len(symbols) == 1 else None


TASK = SpaceReasoning()
