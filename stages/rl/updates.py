"""From groups of responses to optimizer steps: mini-batches, old log-probabilities, the loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import Tensor

from m1.config.rl import Rl
from m1.training.batch import Batch, shared_prompt_batch
from m1.training.trainer import Trainer
from stages.rl.objectives import OBJECTIVES
from stages.rl.sampling import Group

#: About this many pairs of probabilities are kept for a figure.
FIGURE_PAIRS = 4000
#: A response: its group, and its place in it.
Response = tuple[Group, int]


def plan_updates(groups: Sequence[Group], section: Rl, *, seed: str, rank: int, ranks: int) -> list[list[Batch]]:
    """This rank's micro-batches of every optimizer step.

    All responses are shuffled and cut into updates_per_step mini-batches of equal size (fewer where there are too few
    responses), so each is used once. Within a mini-batch those of a group stand together, and ranks and micro-batches
    take consecutive parts: ranks of about equally many tokens, micro-batches of about equally many responses. In a
    micro-batch a prompt is computed once for all its responses. Every rank gets equally many micro-batches; one
    without a response of its own repeats one with an empty mask.
    """
    responses = [(group, i) for group in groups for i in range(len(group.rollouts))]
    random.Random(seed).shuffle(responses)
    count = min(section.updates_per_step, len(responses) // ranks)
    plan = []
    for update in range(count):
        part = responses[update * len(responses) // count : (update + 1) * len(responses) // count]
        part.sort(key=lambda response: response[0].position)
        parts = _even_parts(part, ranks)
        pieces = max(-(-len(mine) // section.micro_batch_size) for mine in parts)
        mine, batches = parts[rank], []
        for piece in range(pieces):
            some = mine[piece * len(mine) // pieces : (piece + 1) * len(mine) // pieces]
            batch = _batch(some or part[:1])
            batches.append(batch if some else batch.empty())
        plan.append(batches)
    return plan


def _even_parts(responses: list[Response], parts: int) -> list[list[Response]]:
    """Consecutive parts of about equally many tokens, a prompt counted once."""
    costs, last = [], None
    for group, i in responses:
        costs.append(len(group.rollouts[i].tokens) + (len(group.prompt.tokens) if group is not last else 0))
        last = group
    shares: list[list[Response]] = [[] for _ in range(parts)]
    total, before = sum(costs), 0.0
    for response, cost in zip(responses, costs):
        shares[int((before + cost / 2) * parts / total)].append(response)
        before += cost
    return shares


def _batch(responses: Sequence[Response]) -> Batch:
    """Prompts and responses in one row."""
    rollouts = [group.rollouts[i] for group, i in responses]
    prompts = {group.position: group.prompt.tokens for group, _ in responses}
    owner = {position: number for number, position in enumerate(prompts)}
    return shared_prompt_batch(
        list(prompts.values()),
        [rollout.tokens for rollout in rollouts],
        [owner[group.position] for group, _ in responses],
        extra={
            "advantages": [[group.advantages[i]] * len(group.rollouts[i].tokens) for group, i in responses],
            "rollout_logprobs": [rollout.logprobs for rollout in rollouts],
        },
    )


@dataclass
class Agreement:
    """How well rollout and training engines agree on the probabilities of the sampled tokens.

    Attributes:
        metrics: Pearson correlation, mean and largest absolute difference, over all ranks.
        pairs: (rollout, training) probabilities of some tokens of this rank, for a figure.
    """

    metrics: dict[str, float]
    pairs: tuple[list[float], list[float]]


def add_old_logprobs(trainer: Trainer, plan: Sequence[Sequence[Batch]]) -> Agreement:
    """Put the log-probabilities of the present weights, by the training forward, into batches as "old_logprobs".

    They, not those of the rollout engine, are the denominator of the importance ratio. The first of several
    mini-batches is left as it is: its update is made with these very weights, so its own forward pass gives them (see
    `Loss`). The two engines are compared on the others, as in the MiniMax-M1 report §3.2, Fig. 3.
    """
    rollout, training = [torch.zeros(0)], [torch.zeros(0)]
    for batch in (batch for batches in plan[1:] or plan for batch in batches):
        batch.extra["old_logprobs"] = trainer.token_logprobs(batch)
        inside = batch.loss_mask > 0
        rollout.append(batch.extra["rollout_logprobs"][inside].exp())
        training.append(batch.extra["old_logprobs"][inside].exp())
    x, y = torch.cat(rollout).double(), torch.cat(training).double()
    difference = (x - y).abs()
    sums = torch.stack(
        (x.new_tensor(len(x)), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(), difference.sum())
    )
    largest = difference.max()[None] if len(x) else x.new_zeros(1)
    torch.distributed.all_reduce(sums)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    n, sx, sy, sxx, syy, sxy, total = sums.tolist()
    spread = ((n * sxx - sx * sx) * (n * syy - sy * sy)) ** 0.5
    metrics = {}
    if n:
        metrics = {"agreement/mean_abs_difference": total / n, "agreement/max_abs_difference": float(largest)}
    if spread > 0:
        metrics["agreement/pearson"] = (n * sxy - sx * sy) / spread
    every = max(1, len(x) // FIGURE_PAIRS)
    return Agreement(metrics, (x[::every].tolist(), y[::every].tolist()))


@dataclass
class Loss:
    """The profile's objective as the trainer's loss function; remembers the largest importance ratio it has seen."""

    section: Rl
    largest_ratio: list[float] = field(default_factory=list)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over this micro-batch; the trainer divides by the tokens of the whole mini-batch on all ranks."""
        objective, part = OBJECTIVES[self.section.objective]
        loss, metrics = objective(
            logprobs,
            batch.extra.get("old_logprobs", logprobs.detach()),
            batch.extra["advantages"],
            batch.loss_mask,
            part(self.section),
            total_tokens=1.0,
        )
        tokens = batch.loss_mask.sum()
        self.largest_ratio.append(float(metrics.pop("cispo/is_weight_max")))
        return loss, tokens, {"loss": loss.detach(), **{name: value * tokens for name, value in metrics.items()}}


def update(trainer: Trainer, plan: Sequence[list[Batch]], section: Rl, learning_rate: float) -> dict[str, float]:
    """Take the planned optimizer steps.

    Returns:
        The means over the steps of everything `Trainer.step` reports (cispo/is_weight_p99 is thereby a mean of the
        micro-batches' percentiles), the largest gradient norm, and the largest importance ratio of any token.
    """
    loss = Loss(section)
    reports = [trainer.step(batches, loss, learning_rate) for batches in plan]
    largest = torch.tensor([max(loss.largest_ratio, default=1.0)])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    if not reports:
        return {}
    means = {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}
    tokens = sum(report["tokens"] for report in reports)
    return {
        "rl/loss": means.pop("loss"),
        "rl/grad_norm": means.pop("grad_norm"),
        "rl/grad_norm_max": max(report["grad_norm"] for report in reports),
        "rl/updates": float(len(reports)),
        "rl/trained_tokens": tokens,
        "cispo/is_weight_max": float(largest),
        **{name: value for name, value in means.items() if name not in ("tokens", "tokens_seen")},
    }
