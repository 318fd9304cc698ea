"""Word sorting: put words in the order of an altered alphabet."""

from __future__ import annotations

import random
import string
from typing import Any

from m1.tasks.logic.base import Knobs, State, Task


def _level(alphabet: int, moved: int, words: int, shortest: int, longest: int) -> Knobs:
    return {"alphabet": alphabet, "moved": moved, "words": words, "shortest": shortest, "longest": longest}


class WordSorting(Task):
    """Words are random strings over the alphabet, all different; a word comes before its own continuations.

    Knobs: size of the `alphabet`, which starts with a; letters `moved` from their usual place (as many as the alphabet
    is long: shuffled); number of `words`, each of `shortest` to `longest` letters. Words of at most two letters are
    spelled with a space between letters.
    """

    name = "word_sorting"
    about = "Sort words by an altered alphabet."
    answer_format = "the words in order; spelled words are separated by commas"
    templates = ("Alphabet {}", "Order {}")
    levels = (
        _level(8, 1, 4, 1, 1),
        _level(8, 3, 4, 1, 1),
        _level(5, 5, 3, 2, 2),
        _level(8, 8, 4, 2, 2),
        _level(26, 2, 5, 3, 5),
        _level(26, 3, 6, 3, 6),
        _level(26, 3, 8, 4, 7),
        _level(26, 4, 10, 4, 8),
        _level(26, 4, 12, 4, 9),
        _level(26, 4, 15, 4, 10),
    )

    def sample(self, rng: random.Random, knobs: Knobs) -> State:
        alphabet = list(string.ascii_lowercase[: knobs["alphabet"]])
        if knobs["moved"] >= len(alphabet):
            rng.shuffle(alphabet)
        else:
            for letter in rng.sample(alphabet, knobs["moved"]):
                alphabet.remove(letter)
                alphabet.insert(rng.randrange(len(alphabet) + 1), letter)
        words: list[str] = []
        while len(words) < knobs["words"]:
            word = "".join(rng.choices(alphabet, k=rng.randint(knobs["shortest"], knobs["longest"])))
            if word not in words:
                words.append(word)
        return {"alphabet": "".join(alphabet), "words": words, "spelled": knobs["longest"] <= 2}

    def describe(self, state: State) -> str:
        return f"{' '.join(state['alphabet'])}. Sort {_join(state['words'], state['spelled'])}"

    def solve(self, state: State) -> tuple[str, str]:
        alphabet, words = state["alphabet"], state["words"]
        ranked = sorted(words, key=lambda word: [alphabet.index(letter) for letter in word])
        steps = []
        for letter in alphabet:
            here = [word for word in ranked if word[0] == letter]
            if max(map(len, words)) == 1:
                steps.append(f"{letter}{'+' if here else '-'}")
            elif here or state["spelled"]:
                steps.append(f"{letter}: {_join(here, state['spelled'])};" if here else f"{letter}-")
        return " ".join(steps), _join(ranked, state["spelled"])

    def parse(self, answer: str) -> Any | None:
        words = answer.split(",") if "," in answer else answer.split()
        joined = ["".join(word.split()) for word in words]
        return joined if joined and all(joined) else None


def _join(words: list[str], spelled: bool) -> str:
    if spelled and all(len(word) == 1 for word in words):
        return " ".join(words)
    return ", ".join(" ".join(word) for word in words) if spelled else " ".join(words)


TASK = WordSorting()
