"""A pass key hidden in real text and asked for later.

The fact is `[pass key word]`. The question repeats `[pass key` and the model continues with the word, which it can
know from the fact alone. This is the passkey test of long-context work (Mohtashami and Jaggi, arXiv 2305.16300) with a
word instead of digits, so that one token is the answer. It is too easy for a large model (MiniMax-01, arXiv 2501.08313
§4.2); for one of a few million parameters it measures what the length extension must keep: that the one softmax layer
in eight finds a token anywhere in the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from m1.tokenizer import Tokenizer
from m1.training.batch import Batch, full_batch
from m1.training.data import TokenStream

#: Words a pass key may be; guessing is right once in as many.
VALUES = 64


@dataclass(frozen=True)
class Question:
    """Tokens (length + 1,) of a text with a fact and questions; `answers` are the positions of the answers' tokens."""

    tokens: Tensor
    answers: list[int]


class Retrieval:
    """Builds such texts. Everything follows from the generator handed in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ask, self.close = tokenizer.encode(" [pass key"), tokenizer.encode("]")
        words = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
        self.values = [i for i, word in words if word.startswith(" ") and word[1:].isalpha() and len(word) >= 5][
            :VALUES
        ]

    def batch(
        self,
        stream: TokenStream,
        indices: Sequence[int],
        questions: int,
        seed: Sequence[int],
        *,
        answer_weight: float,
        text_weight: float = 1.0,
    ) -> Batch:
        """Micro-batch of the stream's sequences, each with a fact; the weights are those of a token in the loss.

        Args:
            seed: with a sequence's index it fixes fact and places.
        """
        built = [self.build(stream.sequence(i), questions, numpy.random.default_rng([*seed, i])) for i in indices]
        batch = full_batch(torch.stack([question.tokens for question in built]))
        batch.loss_mask.fill_(text_weight)
        for row, question in enumerate(built):
            batch.loss_mask[row, [position - 1 for position in question.answers]] = answer_weight
        return batch

    def build(
        self, text: Tensor, questions: int, random: numpy.random.Generator, *, depth: float | None = None
    ) -> Question:
        """Hide one fact in `text` and ask for it, the last time at the end.

        Args:
            text: (length + 1,) tokens of real text; its end makes room for the fact and the questions.
            questions: how often it is asked for, at random places after the fact.
            depth: where the fact stands, 0 the beginning and 1 the end of the text; None puts it at random.

        Raises:
            ValueError: fact and questions are longer than the text.
        """
        fact = [*self.ask, int(random.choice(self.values)), *self.close]
        room = len(text) - (questions + 1) * len(fact)
        if room < 1:
            raise ValueError(f"{questions} questions do not fit into {len(text)} tokens")
        start = int((random.random() if depth is None else depth) * room)
        places = [start, *sorted(random.integers(start, room + 1, size=questions - 1).tolist()), room]
        body, tokens, answers, last = text.tolist(), [], [], 0
        for place in places:
            tokens += body[last:place] + fact
            answers.append(len(tokens) - len(self.close) - 1)
            last = place
        return Question(torch.tensor(tokens), answers[1:])
