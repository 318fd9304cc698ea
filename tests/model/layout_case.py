"""Twenty training steps that every parallel layout has to agree on, and the losses they give on one rank.

`python tests/model/layout_case.py` writes those losses to golden_losses.json again; do so only where the computation is
meant to change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.training.batch import Batch, packed_batch, padded_batch, shared_prompt_batch

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
#: Six layers: two with softmax attention, and enough to place them unevenly in four parts.
MODEL = Model(
    num_layers=6, softmax_every=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=8,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, vocab_size=304, max_position_embeddings=256,
)  # fmt: skip
SEED = 7
MICRO_BATCHES = 2


def continued_batch(samples: list[list[int]], response_starts: list[int]) -> Batch:
    """Every sample cut in two, the second part continuing the first."""
    cut = list(zip(samples, response_starts))
    return shared_prompt_batch([s[:n] for s, n in cut], [s[n:] for s, n in cut], list(range(len(samples))))


FORMS = {"padded": padded_batch, "packed": packed_batch, "continued": continued_batch}


def micro_batches(step: int, form: str) -> list[Batch]:
    """The global batch of a step: two samples of different lengths in each micro-batch, some labels weighted."""
    generator = torch.Generator().manual_seed(step)
    batches = []
    for _ in range(MICRO_BATCHES):
        samples = []
        for _ in range(2):
            length, start, stride = (int(torch.randint(*span, (), generator=generator)) for span in SPANS)
            samples.append([(start + stride * i) % 61 for i in range(length)])
        batch = FORMS[form](samples, [5, 9])
        batch.loss_mask[batch.positions % 4 == 3] *= 0.25
        batches.append(batch)
    return batches


#: Of a sample: length, first token, step from token to token.
SPANS = ((18, 50), (0, 61), (1, 5))


def train(layout: Parallel, checkpoint: Path | None, *, form: str = "padded") -> list[dict[str, float]]:
    """What every step reports, on this rank. Process groups must be those of the layout.

    Args:
        form: of the micro-batches, one of FORMS.
        checkpoint: whose weights to start from; None takes those of the seed.
    """
    from m1.training import parallel
    from m1.training.trainer import Trainer, language_model_loss

    parallel.initialize(layout, 1)
    trainer = Trainer(
        MODEL, layout, seed=SEED if checkpoint is None else SEED + 1, optimizer=Optimizer(eps=1e-8),
        moe_aux_loss_coeff=0.01,
    )  # fmt: skip
    if checkpoint is not None:
        trainer.load(checkpoint, optimizer=False)
    rank, ranks = parallel.data_parallel_rank(), parallel.data_parallel_size()
    return [
        trainer.step(micro_batches(step, form)[rank::ranks], language_model_loss, 4e-3 * min(1, (step + 1) / 5))
        for step in range(STEPS)
    ]


def column(reports: list[dict[str, Any]], name: str) -> list[float]:
    return [report[name] for report in reports]


def main() -> None:
    reports = train(Parallel(), None)
    columns = {name: column(reports, name) for name in ("loss", "grad_norm", "moe_aux_loss")}
    GOLDEN.write_text(json.dumps(columns, indent=1) + "\n")
    print(f"{GOLDEN}: losses {columns['loss'][0]:.6f} to {columns['loss'][-1]:.6f}")


if __name__ == "__main__":
    main()
