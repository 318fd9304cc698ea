"""The stage `tokens`."""

from m1.config.tokens import Tokens
from m1.run.stage import Kind, Stage

STAGES = (
    Stage(
        name="tokens",
        about="The corpus becomes sequences of token ids, a part of it held out.",
        kind=Kind.DATA,
        section=Tokens,
        run="stages.tokens.run:run",
        reads=("corpus", "tokenizer"),
    ),
)
