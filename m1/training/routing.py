"""What the routers of all layers need before a training step, and what they report after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor

from m1.model.router import HybridRouter, routers, shares_of
from m1.training.batch import Batch


class Routing:
    """The routers of this rank through one training step.

    Args:
        chunks: the parts of the model on this rank.
        coefficient: of the auxiliary loss; zero leaves it out.
        counts: "global" takes f over the whole global batch, for which the step begins with a forward pass without
            gradients where a rank has several micro-batches; "running" takes it over the micro-batches so far.
    """

    def __init__(self, chunks: list[Any], coefficient: float, counts: Literal["global", "running"]) -> None:
        self.routers: list[HybridRouter] = routers(chunks)
        self.coefficient, self.counts = coefficient, counts
        self.config = chunks[0].config

    def begin_step(self, micro_batches: list[Batch], forward: Callable[[], Any]) -> None:
        """Prepare for the forward passes of a step.

        Args:
            micro_batches: whole ones, as every rank of a model-parallel group has them.
            forward: passes them through the model without gradients.
        """
        if not self.coefficient:
            self._begin("train")
            return
        from megatron.core import parallel_state

        labels = sum(float(batch.loss_mask.sum()) for batch in micro_batches)
        real = sum(int((~batch.padding_mask).sum()) for batch in micro_batches)
        sizes = torch.tensor([labels, real], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.all_reduce(sizes, group=parallel_state.get_data_parallel_group())
        labels, tokens = sizes.tolist()
        shares = None
        if self.counts == "global" and len(micro_batches) > 1:
            self._begin("count")
            forward()
            shares = shares_of(self._over_all_ranks()[:, : self.config.num_moe_experts])
        # The trainer divides every gradient by the number of labels.
        self._begin("train", weight=self.coefficient * labels, tokens=max(tokens, 1.0), shares=shares)

    def end_step(self) -> dict[str, float]:
        """Close the step.

        Returns:
            "moe_load/NN": the share of expert NN in the choices of all layers, between 0 and 1.
            "moe_load_max": the largest load of any expert in any layer, in even shares.
            "moe_dropped_tokens": choices beyond an expert's capacity, over all layers; with a capacity only.
            "moe_aux_loss": mean over the layers, without its coefficient; with a coefficient only.
        """
        experts = self.config.num_moe_experts
        table = self._over_all_ranks()
        self._begin("off")
        load = table[:, :experts] / table[:, :experts].sum(dim=1, keepdim=True).clamp(min=1)
        metrics = {f"moe_load/{expert:02d}": share for expert, share in enumerate(load.mean(dim=0).tolist())}
        metrics["moe_load_max"] = float(load.max()) * experts
        if self.config.moe_expert_capacity_factor is not None:
            metrics["moe_dropped_tokens"] = float(table[:, experts].sum())
        if self.coefficient:
            metrics["moe_aux_loss"] = float(table[:, experts + 1].mean())
        return metrics

    def _begin(self, mode: Literal["off", "count", "train"], *, shares: Tensor | None = None, **more: float) -> None:
        for router in self.routers:
            router.begin(mode, shares=None if shares is None else shares[router.layer_number - 1], **more)

    def _over_all_ranks(self) -> Tensor:
        """Float64 (layers, experts + 2): choices of every expert, dropped ones, auxiliary loss.

        Every rank has its own tokens in its own layers, so one sum over the whole world puts them together.
        """
        table = torch.zeros(
            self.config.num_layers, self.config.num_moe_experts + 2,
            dtype=torch.float64, device=torch.cuda.current_device(),
        )  # fmt: skip
        for router in self.routers:
            table[router.layer_number - 1] = torch.cat((router.routed, router.dropped[None], router.aux_loss()[None]))
        torch.distributed.all_reduce(table)
        return table
