"""One training step through Megatron-core: its DDP, its distributed optimizer, its forward-backward schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import m1.model  # noqa: F401  (prepares Megatron-core for this machine)
from kernels.fused import label_logprobs
from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.errors import M1Error
from m1.formats import weights as base
from m1.formats.folder import Base
from m1.model.attention import Packing
from m1.model.hybrid import HybridModel, build_model
from m1.training import checkpoint
from m1.training.batch import Batch
from m1.training.routing import Routing

#: (token log-probabilities (batch, sequence) float32, batch) -> (sum of losses, sum of the loss mask, sums to log).
#: Under context parallelism both are one part of the sequence, and the sums are added up over the parts.
LossFunction = Callable[[Tensor, Batch], tuple[Tensor, Tensor, dict[str, Tensor]]]


class NonFiniteGradient(M1Error):
    """Loss or gradient is not a number; the weights were not touched."""


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label, float32 (batch, sequence), from this rank's part of the vocabulary."""
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return label_logprobs(logits, labels)
    losses = tensor_parallel.vocab_parallel_cross_entropy(
        logits.float().transpose(0, 1).contiguous(), labels.T.contiguous()
    )
    return -losses.T


def label_is_best(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where no token has a higher logit than the label, else 0; float32 (batch, sequence)."""
    from megatron.core import parallel_state

    best = logits.float().amax(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(best, op=torch.distributed.ReduceOp.MAX, group=group)
    first = group.rank() * logits.shape[-1]
    here = (labels >= first) & (labels < first + logits.shape[-1])
    mine = logits.float().gather(-1, (labels - first).where(here, 0)[..., None])[..., 0].where(here, -torch.inf)
    torch.distributed.all_reduce(mine, op=torch.distributed.ReduceOp.MAX, group=group)
    return (mine >= best).float()


def language_model_loss(logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Cross entropy summed over the labels that count."""
    loss = -(logprobs * batch.loss_mask).sum()
    return loss, batch.loss_mask.sum(), {"loss": loss.detach()}


class Trainer:
    """The model of this rank with its optimizer.

    Gradients are summed over all micro-batches of all data-parallel ranks and divided by the total number of tokens
    that count (token-level normalisation), then clipped by their global norm. Micro-batches are handed in whole, the
    same ones on every rank that shares a model: the trainer cuts out what each works on.

    Attributes:
        chunks: the parts of the model that this rank holds, several under the interleaved pipeline schedule.
        model: the first of them, which is the whole model where neither layers nor weights are split.
        tokens_seen: input tokens of all steps on all ranks, without padding; kept in checkpoints.
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
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import (
            OptimizerConfig,
            ParamKey,
            get_megatron_optimizer,
            get_standard_config_overrides,
        )

        count = parallel.virtual_pipeline_model_parallel_size
        self.chunks: list[HybridModel] = [
            build_model(
                model,
                parallel,
                seed=seed,
                rotary_base=rotary_base,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )
            for stage in (range(count) if count > 1 else [None])
        ]
        self.model, self.parallel = self.chunks[0], parallel
        self.config = self.model.config
        self.routing = Routing(self.chunks, moe_aux_loss_coeff, parallel.moe_aux_loss_counts)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        for name, parameter in (named for chunk in self.chunks for named in chunk.named_parameters()):
            if ".experts." in name:
                parameter.allreduce = False  # type: ignore[attr-defined]  # one optimizer layout with and without EP
        self.ddps: list[Any] = []
        for chunk in self.chunks:
            chunk.config.finalize_model_grads_func = self._finalize_gradients
            self.ddps.append(DistributedDataParallel(chunk.config, ddp_config, chunk))
        settings = OptimizerConfig(
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
        )
        overrides = get_standard_config_overrides(settings)
        # The float32 head beside bf16 weights: Megatron's index of a group's parameters needs them to be of one type.
        overrides[ParamKey(name="*output_layer.weight")] = {"lr_mult": 1.0}
        if optimizer.final_norm_lr_mult != 1.0:
            overrides[ParamKey(name="*final_layernorm.weight")] = {"lr_mult": optimizer.final_norm_lr_mult}
        self.optimizer = get_megatron_optimizer(
            settings, self.ddps, config_overrides=overrides, use_gloo_process_groups=False
        )
        self.tokens_seen = 0.0
        for group in self.optimizer.param_groups:
            group["fused"] = True  # torch's AdamW then makes one pass over the memory instead of a dozen

    # ------------------------------------------------------------------ training

    def step(self, micro_batches: list[Batch], loss_function: LossFunction, learning_rate: float) -> dict[str, float]:
        """One optimizer step on this rank's micro-batches (every rank passes the same number of them).

        Returns:
            The loss function's sums divided by the global number of tokens, "grad_norm", "tokens" (global),
            "tokens_seen", and what the routers tell (`Routing.end_step`).

        Raises:
            NonFiniteGradient: the gradient norm is not finite; weights and optimizer state are as before.
        """
        for ddp in self.ddps:
            ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = self._prepare(micro_batches)
        self.routing.begin_step(batches, lambda: self._route(batches))
        sums = self._forward_backward(batches, loss_function, forward_only=False)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient norm is {norm}, the weights were not changed",
                "Lower the learning rate or the gradient clip, and rerun: it continues from the last checkpoint.",
            )
        self._update(norm)
        self.tokens_seen += sums.pop("inputs", 0.0)
        metrics = _per_token(sums)
        metrics |= {"grad_norm": norm, "tokens_seen": self.tokens_seen}
        return {**metrics, **self.routing.end_step()}

    def _update(self, norm: float) -> None:
        """Clip and move the weights; Megatron's `optimizer.step` would prepare gradients and take their norm again."""
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        for part in self.optimizer.chained_optimizers:
            if part.config.clip_grad > 0 and not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, norm)
        self.optimizer.step_with_ready_grads()

    @torch.no_grad()
    def evaluate(self, batches: list[Batch], loss_function: LossFunction = language_model_loss) -> dict[str, float]:
        """The loss function's sums over all ranks divided by the number of tokens; no gradient."""
        for chunk in self.chunks:
            chunk.eval()
        try:
            return _per_token(self._forward_backward(self._prepare(batches), loss_function, forward_only=True))
        finally:
            for chunk in self.chunks:
                chunk.train()

    def token_logprobs(self, batch: Batch) -> Tensor:
        """Log-probability of every label by the training forward, float32 (batch, sequence), on every rank."""
        return self._per_label(batch, token_logprobs)

    def predicts_labels(self, batch: Batch) -> Tensor:
        """1 where no token is more probable than the label, else 0; float32 (batch, sequence), on every rank."""
        return self._per_label(batch, label_is_best)

    # ------------------------------------------------------------------ schedule

    def _prepare(self, micro_batches: list[Batch]) -> list[Batch]:
        """The micro-batches on this rank's device, in shapes and a number that the layout can pass around.

        Sequences are padded to whole parts for every rank that shares them. Pipeline stages pass tensors of one shape,
        and so do ranks that gather each other's tokens; the interleaved schedule takes micro-batches in groups.
        """
        layout = self.parallel
        multiple = layout.tensor_model_parallel_size * layout.context_parallel_size
        gathering = layout.expert_model_parallel_size > 1 and layout.token_dispatcher == "allgather"
        batches = [batch.to(torch.cuda.current_device()) for batch in micro_batches]
        if layout.pipeline_model_parallel_size > 1 or gathering:
            if any(batch.offsets for batch in batches):
                batches = [batch.in_one_row() for batch in batches]
            largest = torch.tensor([b.tokens.shape for b in batches], device=torch.cuda.current_device()).amax(dim=0)
            if gathering:
                torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
            shapes = [largest.tolist()] * len(batches)
        else:
            shapes = [list(batch.tokens.shape) for batch in batches]
        batches = [
            batch.resized(rows, -(-length // multiple) * multiple) for batch, (rows, length) in zip(batches, shapes)
        ]
        if layout.virtual_pipeline_model_parallel_size > 1:
            missing = -len(batches) % layout.pipeline_model_parallel_size
            batches += [batches[-1].empty()] * missing
        return batches

    def _schedule(
        self, batches: list[Batch], finish: Callable[[Tensor, Batch], Any], *, forward_only: bool, collect: bool = False
    ) -> list[Any]:
        """Run Megatron's schedule over prepared micro-batches.

        Args:
            finish: (logits, this rank's part of the micro-batch) -> what Megatron expects of a loss function, or
                anything if `collect`.

        Returns:
            The last part of what `finish` returned for each micro-batch (all of it if `collect`), on the ranks of the
            last pipeline stage; nothing on the others.
        """
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
        parts = [batch.part(rank, ranks) for batch in batches]

        def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
            batch: Batch = next(iterator)
            packing = None if batch.offsets is None else Packing(batch.offsets, batch.parents)
            logits = model(
                batch.tokens, batch.positions, None, packed_seq_params=packing, padding_mask=batch.padding_mask
            )
            return logits, lambda output, non_loss_data=False: finish(output, batch)

        several = len(self.ddps) > 1
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(parts) for _ in self.ddps] if several else iter(parts),
            model=self.ddps,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1],
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
            collect_non_loss_data=collect,
        )

    def _forward_backward(
        self, batches: list[Batch], loss_function: LossFunction, *, forward_only: bool
    ) -> dict[str, float]:
        """Sums of the loss function over prepared micro-batches and ranks, with the keys "tokens" and "inputs"."""
        from megatron.core import parallel_state

        device = torch.device(torch.cuda.current_device())
        self._tokens = torch.zeros((), dtype=torch.float64, device=device)

        def finish(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, tokens, sums = loss_function(token_logprobs(logits, batch.labels), batch)
            self._tokens += tokens.detach()
            counts = {"tokens": tokens.detach(), "inputs": (~batch.padding_mask).sum()}
            # The whole number that Megatron adds up is not used: `_finalize_gradients`.
            return loss, tokens.detach().to(torch.int), {**sums, **counts}

        reports = self._schedule(batches, finish, forward_only=forward_only)
        names = sorted(reports[0]) if reports else []
        values = torch.tensor(
            [sum(float(r[name]) for r in reports) for name in names], dtype=torch.float64, device=device
        )
        if names:
            torch.distributed.all_reduce(values, group=_data_parallel_group())
        box = [dict(zip(names, values.tolist()))]
        if self.parallel.pipeline_model_parallel_size > 1:
            last, group = _last_stage(), parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast_object_list(box, src=last, group=group, device=device)
        return box[0]

    def _finalize_gradients(self, ddps: list[Any], _tokens: Any, **options: Any) -> None:
        """Reduce the gradients over ranks and divide them by the number of tokens, which need not be a whole one."""
        from megatron.core import parallel_state
        from megatron.core.distributed import finalize_model_grads

        finalize_model_grads(ddps, None, **options)
        total = self._tokens
        torch.distributed.all_reduce(total, group=_data_parallel_group())
        if self.parallel.pipeline_model_parallel_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(total, src=_last_stage(), group=group)
        factor = torch.where(total > 0, 1.0 / total, torch.ones_like(total))
        for ddp in ddps:
            ddp.scale_gradients(factor)

    @torch.no_grad()
    def _route(self, batches: list[Batch]) -> None:
        """Pass the micro-batches through all layers, for the routers to count."""

        def finish(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            return logits.new_zeros(()), torch.zeros((), dtype=torch.int, device=logits.device), {}

        self._schedule(batches, finish, forward_only=True)

    @torch.no_grad()
    def _per_label(self, batch: Batch, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`function` of (logits, labels), float32 (batch, sequence), from whichever ranks have them, on every rank."""
        from megatron.core import parallel_state

        batches = self._prepare([batch])
        found = self._schedule(
            batches, lambda logits, part: function(logits, part.labels), forward_only=True, collect=True
        )
        whole = torch.empty(batches[0].tokens.shape, dtype=torch.float32, device=batches[0].tokens.device)
        if found:
            parts = list(whole.chunk(self.parallel.context_parallel_size, dim=1))
            if len(parts) > 1:
                parts = [part.contiguous() for part in parts]
                group = parallel_state.get_context_parallel_group()
                torch.distributed.all_gather(parts, found[0].float().contiguous(), group=group)
                whole = torch.cat(parts, dim=1)
            else:
                whole = found[0].float().contiguous()
        if self.parallel.pipeline_model_parallel_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(whole, src=_last_stage(), group=group)
        rows, length = batch.tokens.shape
        return whole[:rows, :length]

    @torch.no_grad()
    def layer_gradient_norms(self) -> dict[int, float]:
        """Gradient norm of every layer (0-based, over all ranks), to be called after `step`.

        The distributed optimizer leaves each rank the reduced gradient of its own shard only, so the shards' squares
        are summed over all ranks. Clipping has already been applied when `step` has returned.
        """
        from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

        squares = torch.zeros(self.config.num_layers, dtype=torch.float64, device=torch.cuda.current_device())
        owners = self.optimizer.chained_optimizers
        layers = [layer for chunk in self.chunks for layer in chunk.decoder.layers]
        for index, parameter in ((layer.layer_number - 1, p) for layer in layers for p in layer.parameters()):
            if not param_is_not_tensor_parallel_duplicate(parameter):
                continue
            owner = next((o for o in owners if parameter in o.model_param_gbuf_map), None)
            if owner is None:
                continue
            try:
                shard = owner._get_model_param_range_map(parameter)["param"]
            except KeyError:
                continue  # this rank owns no part of it
            gradient = parameter.main_grad.view(-1)[shard.start : shard.end]  # type: ignore[attr-defined]
            squares[index] += gradient.double().square().sum()
        torch.distributed.all_reduce(squares)
        return {layer: math.sqrt(value) for layer, value in enumerate(squares.tolist())}

    def set_rotary_base(self, base: float) -> None:
        """Change the RoPE base in place (context extension)."""
        for chunk in self.chunks:
            chunk.set_rotary_base(base)

    # ------------------------------------------------------------------ checkpoints

    def save(self, folder: Path, state: dict[str, Any]) -> Path:
        """Write a complete checkpoint (model, optimizer, `state` as JSON values) to `folder`, atomically."""
        writer = checkpoint.Writer()
        self.begin_save(writer, folder, state)
        writer.wait()
        return folder

    def begin_save(self, writer: checkpoint.Writer, folder: Path, state: dict[str, Any]) -> None:
        """As `save`, complete once the writer has finished; the training may go on."""
        state = {**state, "rotary_base": self.model.rotary_base, "tokens_seen": self.tokens_seen}
        writer.begin(folder, _Whole(self.chunks), self.optimizer, state)

    def load(self, folder: Path, *, optimizer: bool = True, verified: bool = False) -> dict[str, Any]:
        """Load weights, and the optimizer's state unless a new stage starts; returns the saved `state`."""
        state = checkpoint.load(folder, _Whole(self.chunks), self.optimizer if optimizer else None, verified=verified)
        self.set_rotary_base(state["rotary_base"])
        self.tokens_seen = state.get("tokens_seen", 0.0) if optimizer else 0.0
        if not optimizer:
            self.optimizer.reload_model_params()  # with bf16 weights it keeps float32 copies of its own
        return state

    def load_base(self, found: Base) -> list[str]:
        """Take the weights of a base model (`m1.formats.folder.inspect`), with a fresh optimizer; returns notes."""
        notes = [note for chunk in self.chunks for note in base.load(found, chunk)]
        self.optimizer.reload_model_params()
        return list(dict.fromkeys(notes))


class _Whole:
    """Several parts of a model as one, for checkpoints: their layers carry numbers counted over all of them."""

    def __init__(self, chunks: list[HybridModel]) -> None:
        self.chunks = chunks
        self.settings = chunks[0].settings

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        if len(self.chunks) == 1:
            return self.chunks[0].sharded_state_dict(metadata=metadata)
        return {str(i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.chunks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(self.chunks) == 1:
            self.chunks[0].load_state_dict(state)
            return
        for i, chunk in enumerate(self.chunks):
            chunk.load_state_dict(state[str(i)])


def _data_parallel_group() -> Any:
    """The ranks whose losses and gradients add up: data-parallel and context-parallel ones."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _last_stage() -> int:
    """Global rank of the last stage of this rank's pipeline."""
    from megatron.core import parallel_state

    return parallel_state.get_pipeline_model_parallel_last_rank()


def _per_token(sums: dict[str, float]) -> dict[str, float]:
    tokens, _ = sums.pop("tokens", 0.0), sums.pop("inputs", 0.0)
    return {**{name: value / max(tokens, 1.0) for name, value in sums.items()}, "tokens": tokens}
