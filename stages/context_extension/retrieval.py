"""Facts hidden in real text and asked for at its end.

A fact is `[key first second]`, three words of the vocabulary; the key does not occur in the text around it. The
question repeats `[key` and the model continues with both values. Plain needle tests are too easy for large models
(MiniMax-01, arXiv 2501.08313 §4.2); for a model of a few million parameters they measure what the length extension
must keep: that the one softmax layer in eight still finds a token anywhere in the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from m1.tokenizer import Tokenizer


@dataclass(frozen=True)
class Question:
    """Tokens (length + 1,) of a text with facts and questions; `answers` are the positions of the value tokens."""

    tokens: Tensor
    answers: list[int]


class Retrieval:
    """Builds such texts. Everything follows from the generator handed in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.open, self.close = tokenizer.encode(" ["), tokenizer.encode("]")
        words = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
        self.words = [i for i, w in enumerate(words) if w.startswith(" ") and w[1:].isalpha() and len(w) >= 5]

    def build(
        self, text: Tensor, facts: int, random: numpy.random.Generator, *, depth: float | None = None
    ) -> Question:
        """Hide facts in `text` and ask for all of them at its end, in another order.

        Args:
            text: (length + 1,) tokens of real text; its end makes room for facts and questions.
            depth: where the facts stand, 0 the beginning and 1 the end of the text; None spreads them at random.
        """
        present = set(text.tolist())
        free = [word for word in self.words if word not in present]
        keys = random.choice(free if len(free) >= facts else self.words, size=facts, replace=False)
        values = random.choice(self.words, size=(facts, 2))
        whole = [[*self.open, int(k), int(a), int(b), *self.close] for k, (a, b) in zip(keys, values)]
        room = len(text) - 2 * sum(len(fact) for fact in whole)
        if room < facts:
            raise ValueError(f"{facts} facts do not fit into {len(text)} tokens")
        places = random.integers(0, room, size=facts) if depth is None else numpy.full(facts, int(depth * room))
        tokens: list[int] = []
        body, last = text[:room].tolist(), 0
        for place, fact in sorted(zip(places.tolist(), whole), key=lambda pair: pair[0]):
            tokens += body[last:place] + fact
            last = place
        tokens += body[last:]
        answers = []
        for index in random.permutation(facts):
            first = len(tokens) + len(self.open) + 1
            answers += [first, first + 1]
            tokens += whole[index]
        return Question(torch.tensor(tokens), answers)
