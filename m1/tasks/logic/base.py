"""What every task has: a generator with a difficulty dial, worked reasoning, and a verifier.

A task is four plain functions: `sample` draws the content of a problem as JSON values (its state), `describe` words
it, `solve` works it out step by step, `verify` judges an answer. The wording is a function of the state, so two
problems have the same question if and only if they have the same content; splits by question are splits by content.
Verifiers parse literally: model output is never evaluated.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from m1 import chat
from m1.tasks.base import Row

LEVELS = range(1, 11)
State = dict[str, Any]
Knobs = dict[str, Any]

#: Longest answer a verifier looks at, in characters; every correct answer is far shorter.
MAX_ANSWER_CHARACTERS = 4096
NONE = "none"


@dataclass(frozen=True)
class Problem:
    """One problem with its worked answer.

    Attributes:
        state: the content as JSON values, with the key "solution"; all that `verify` needs.
    """

    task: str
    question: str
    answer: str
    reasoning: str
    difficulty: int
    state: State

    @property
    def id(self) -> str:
        """Content hash of task and question, 16 hex digits."""
        return hashlib.sha256(f"{self.task}\n{self.question}".encode()).hexdigest()[:16]

    def row(self, *, with_response: bool) -> Row:
        """The problem as a line of a data set; the worked response only where it is asked for."""
        # A leading space: a symbol at the start then is the same token as elsewhere.
        response = chat.render_response(f" {self.reasoning}", f" {self.answer}") if with_response else None
        return Row(
            id=self.id,
            family="logic",
            task=self.task,
            difficulty=self.difficulty,
            question=self.question,
            prompt=chat.render_prompt(self.question),
            answer=self.answer,
            state=self.state,
            response=response,
        )


class Task(ABC):
    """A kind of problem.

    Attributes:
        name: key in the registry and in profiles.
        about: one sentence for people.
        answer_format: what a correct answer looks like, for people.
        templates: wordings, each with one `{}` for the description.
        levels: knobs of difficulty 1 to 10.
    """

    name: str
    about: str
    answer_format: str
    templates: tuple[str, ...]
    levels: tuple[Knobs, ...]

    def knobs(self, difficulty: int) -> Knobs:
        """Generator settings of a difficulty from 1 to 10.

        Raises:
            ValueError: no such difficulty.
        """
        if difficulty not in LEVELS:
            raise ValueError(f"{self.name}: difficulty={difficulty} must be from {LEVELS[0]} to {LEVELS[-1]}")
        return dict(self.levels[difficulty - 1])

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """One problem, a function of the state of `rng` alone."""
        state = self.sample(rng, self.knobs(difficulty))
        reasoning, answer = self.solve(state)
        return Problem(self.name, self.word(state), answer, reasoning, difficulty, {**state, "solution": answer})

    def word(self, state: State) -> str:
        """The question; which template is used depends on the content, not on a further draw."""
        digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).digest()
        return self.templates[digest[0] % len(self.templates)].format(self.describe(state))

    def verify(self, state: State, answer: str) -> bool:
        """Whether `answer` solves the problem with this state. Any text is allowed and none raises."""
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return False
        parsed = self.parse(answer)
        return parsed is not None and parsed == self.parse(state["solution"])

    @abstractmethod
    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        """Draw the content of a problem."""

    @abstractmethod
    def describe(self, state: State) -> str:
        """Word the content."""

    @abstractmethod
    def solve(self, state: State) -> tuple[str, str]:
        """(worked reasoning, answer). The solution is unique."""

    @abstractmethod
    def parse(self, answer: str) -> Any | None:
        """The value an answer denotes, equal for equivalent answers; None for what is not an answer at all."""


_SEPARATORS = re.compile(r"[\s,;:]+")


def parse_integer(text: str) -> int | None:
    """An integer in decimal ASCII digits, with optional sign and leading zeros; anything else is None."""
    text = text.strip()
    sign = text[:1] if text[:1] in ("+", "-") else ""
    digits = text[len(sign) :].lstrip()
    return int(sign + digits) if digits.isascii() and digits.isdigit() and len(digits) <= 100 else None


def split_symbols(text: str) -> list[str]:
    """Symbols separated by white space, commas, semicolons or colons."""
    return [symbol for symbol in _SEPARATORS.split(text) if symbol]


def parse_set(text: str) -> frozenset[str] | None:
    """A set of distinct symbols in any order; the word "none" is the empty set; a symbol given twice is None."""
    symbols = split_symbols(text)
    if symbols == [NONE]:
        return frozenset()
    if not symbols or NONE in symbols or len(set(symbols)) != len(symbols):
        return None
    return frozenset(symbols)
