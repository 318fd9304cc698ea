"""The stage `tokenizer`."""

from m1.config.tokenizer import Tokenizer
from m1.run.stage import Kind, Stage

STAGES = (
    Stage(
        name="tokenizer",
        about="A byte-level BPE vocabulary is trained on the corpus.",
        kind=Kind.DATA,
        section=Tokenizer,
        run="stages.tokenizer.run:run",
        reads=("corpus",),
        settings=("model.vocab_size",),
    ),
)
