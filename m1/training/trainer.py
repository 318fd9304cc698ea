"""One training step through Megatron-core: its DDP, its distributed optimizer, its forward-backward schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import m1.model  # noqa: F401  (prepares Megatron-core for this machine)
from m1.errors import M1Error
from m1.interchange import Base
from m1.model.hybrid import HybridModel, build_model
from m1.profile import Model, Optimizer, Parallel
from m1.training import base, checkpoint
from m1.training.batch import Batch

#: (token log-probabilities (batch, sequence) float32, batch) -> (sum of losses, number of tokens, sums to log)
LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


class NonFiniteGradient(M1Error):
    """Loss or gradient is not a number; the weights were not touched."""


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, float32 (batch, sequence), from this rank's part of the vocabulary."""
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return -F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none").view_as(labels)
    losses = tensor_parallel.vocab_parallel_cross_entropy(
        logits.float().transpose(0, 1).contiguous(), labels.T.contiguous()
    )
    return -losses.T


def language_model_loss(logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross entropy summed over the labels that count."""
    loss = -(logprobs * batch.loss_mask).sum()
    return loss, batch.loss_mask.sum(), {"loss": loss.detach()}


class Trainer:
    """The model of this rank with its optimizer.

    Gradients are summed over all micro-batches of all data-parallel ranks and divided by the total number of tokens
    that count (token-level normalisation), then clipped by their global norm.
    """

    def __init__(
        self,
        model: Model,
        parallel: Parallel,
        *,
        seed: int,
        optimizer: Optimizer,
        rotary_base: float | None = None,
        moe_aux_loss_coeff: float = 0.0,
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        self.model: HybridModel = build_model(
            model,
            parallel,
            seed=seed,
            rotary_base=rotary_base,
            moe_aux_loss_coeff=moe_aux_loss_coeff,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        self.config = self.model.config
        self.config.finalize_model_grads_func = finalize_model_grads
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        for name, parameter in self.model.named_parameters():
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]  # one optimizer layout with and without EP
        self.ddp = DistributedDataParallel(self.config, ddp_config, self.model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                use_distributed_optimizer=True,
                params_dtype=self.config.params_dtype,
                bf16=self.config.bf16,
            ),
            [self.ddp],
            use_gloo_process_groups=False,
        )
        for group in self.optimizer.param_groups:
            group["fused"] = True  # torch's AdamW then makes one pass over the memory instead of a dozen

    # ------------------------------------------------------------------ training

    def step(self, micro_batches: list[Batch], loss_function: LossFunction, learning_rate: float) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches (every rank passes the same number of them).

        Returns:
            The loss function's sums divided by the global number of tokens, "grad_norm", "tokens" (global), and
            "moe_aux_loss" where the coefficient is above zero.

        Raises:
            NonFiniteGradient: the gradient norm is not finite; weights and optimizer state are as before.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._forward_backward(micro_batches, loss_function, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient norm is {norm}, the weights were not changed",
                "Lower the learning rate or the gradient clip, and rerun: it continues from the last checkpoint.",
            )
        self.optimizer.step()
        metrics = _per_token(sums)
        metrics["grad_norm"] = norm
        if self.config.moe_aux_loss_coeff:
            metrics["moe_aux_loss"] = self._moe_aux_loss(len(micro_batches))
        return metrics

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], loss_function: LossFunction = language_model_loss) -> dict[str, float]:
        """The loss function's sums over all ranks divided by the number of tokens; no gradient."""
        self.model.eval()
        try:
            return _per_token(self._forward_backward(batches, loss_function, forward_only=True))
        finally:
            self.model.train()

    @torch.no_grad()
    def token_logprobs(self, batch: Batch) -> Tensor:
        """Log-probability of every label by the training forward, float32 (batch, sequence). Single pipeline stage."""
        logits = self.model(batch.tokens, _positions(batch.tokens), None, padding_mask=batch.padding_mask)
        return token_logprobs(logits, batch.labels)

    def _forward_backward(
        self, micro_batches: list[Batch], loss_function: LossFunction, *, forward_only: bool
    ) -> dict[str, float]:
        """Run Megatron's schedule; returns sums over micro-batches and ranks, with the key "tokens"."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            batch: Batch = next(iterator)
            logits = model(batch.tokens, _positions(batch.tokens), None, padding_mask=batch.padding_mask)

            def reduce(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                loss, tokens, sums = loss_function(token_logprobs(logits, batch.labels), batch)
                return loss, tokens.detach().to(torch.int), {**sums, "tokens": tokens.detach()}

            return logits, reduce

        shape = micro_batches[0].tokens.shape
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.ddp],
            num_microbatches=len(micro_batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=forward_only,
        )
        names = sorted(reports[0]) if reports else []
        values = torch.tensor([sum(float(r[name]) for r in reports) for name in names], dtype=torch.float64)
        if names:
            torch.distributed.all_reduce(values, group=parallel_state.get_data_parallel_group())
        return dict(zip(names, values.tolist()))

    def _moe_aux_loss(self, micro_batches: int) -> float:
        """Load-balancing loss (before its coefficient), mean over layers and micro-batches of this rank."""
        from megatron.core.transformer.moe import moe_utils

        tracker = moe_utils.get_moe_layer_wise_logging_tracker()
        values = tracker["load_balancing_loss"]["values"] if "load_balancing_loss" in tracker else torch.zeros(1)
        loss = float(values.mean()) / micro_batches
        moe_utils.clear_aux_losses_tracker()
        return loss

    @torch.no_grad()
    def layer_gradient_norms(self) -> dict[int, float]:
        """Gradient norm of every layer (0-based, over all ranks) after `step`, before clipping rescaled nothing back.

        The distributed optimizer leaves each rank the reduced gradient of its own shard only, so the shards' squares
        are summed over all ranks. Clipping has already been applied when `step` has returned.
        """
        squares = torch.zeros(self.config.num_layers, dtype=torch.float64)
        owners = self.optimizer.chained_optimizers
        for name, parameter in self.model.named_parameters():
            parts = name.split(".")
            if "layers" not in parts:
                continue
            layer = self.model.decoder.layers[int(parts[parts.index("layers") + 1])].layer_number - 1
            owner = next((o for o in owners if parameter in o.model_param_gbuf_map), None)
            if owner is None:
                continue
            try:
                shard = owner._get_model_param_range_map(parameter)["param"]
            except KeyError:
                continue  # this rank owns no part of it
            gradient = parameter.main_grad.view(-1)[shard.start : shard.end]  # type: ignore[attr-defined]
            squares[layer] += gradient.double().square().sum()
        torch.distributed.all_reduce(squares)
        return {layer: math.sqrt(value) for layer, value in enumerate(squares.tolist())}

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a complete checkpoint (model, optimizer, `state` as JSON values) to `folder`, atomically."""
        state = {**state, "rotary_base": self.model.rotary_base}
        return checkpoint.save(folder, self.model, self.optimizer, state)

    def load(self, folder: Path, *, optimizer: bool = True) -> dict[str, Any]:
        """Load weights, and the optimizer's state unless a new stage starts; returns the saved `state`."""
        state = checkpoint.load(folder, self.model, self.optimizer if optimizer else None)
        self.model.set_rotary_base(state["rotary_base"])
        if not optimizer:
            self.optimizer.reload_model_params()  # with bf16 weights it keeps float32 copies of its own
        return state

    def load_base(self, found: Base) -> list[str]:
        """Take the weights of a base model (`m1.interchange.inspect`), with a fresh optimizer; returns notes."""
        notes = base.load(found, self.model)
        self.optimizer.reload_model_params()
        return notes


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _per_token(sums: dict[str, float]) -> dict[str, float]:
    tokens = sums.pop("tokens", 0.0)
    return {**{name: value / max(tokens, 1.0) for name, value in sums.items()}, "tokens": tokens}
