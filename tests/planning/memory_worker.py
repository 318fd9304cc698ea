"""Run by torchrun with two ranks for test_memory: real bytes of a small trainer at several layouts, as JSON lines."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.config.training import Optimizer
from m1.training.measure import count_trainer

SMALL = Model(
    num_layers=2, softmax_every=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=32,
    num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=96, vocab_size=512, max_position_embeddings=512,
)  # fmt: skip
LOAD = {"sequence_length": 256, "micro_batch_size": 2, "micro_batches": 1}
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16"},
    {"tensor_model_parallel_size": 2, "precision": "bf16"},
    {"expert_model_parallel_size": 2, "precision": "bf16"},
]


class Kept:
    """Bytes that autograd saves, each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.tensors: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self.known:
            self.tensors.setdefault(address, tensor)  # held, or the address would be used again
        return tensor

    @property
    def total(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def kept_by_layer(model: Any, hidden: torch.Tensor, layer: int) -> int:
    """Bytes that one layer keeps for a micro-batch; its input counts, as the layer before it made it for this one."""
    rotary = model.rotary_pos_emb(LOAD["sequence_length"])
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        output, _ = model.decoder.layers[layer](hidden.requires_grad_(), None, rotary_pos_emb=rotary)
    output.float().sum().backward()
    return kept.total - rotary.untyped_storage().nbytes() * (rotary.untyped_storage().data_ptr() in kept.tensors)


def measure(layout: dict[str, Any]) -> dict[str, Any]:
    from m1.training import parallel
    from m1.training.batch import full_batch
    from m1.training.trainer import Trainer, language_model_loss

    settings = Parallel(world_size=2, **layout)
    parallel.initialize(settings, 1)
    trainer = Trainer(SMALL, settings, seed=1, optimizer=Optimizer(eps=1e-8))
    before = count_trainer(trainer)
    shape = (LOAD["micro_batch_size"], LOAD["sequence_length"] + 1)
    tokens = torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    trainer.step([full_batch(tokens)], language_model_loss, 1e-3)
    stepped = 0
    for part in trainer.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            stepped += sum(x.numel() * x.element_size() for x in state.values() if torch.is_tensor(x) and x.dim())
        copies = [p for group in part.shard_fp32_from_float16_groups for p in group if p is not None]
        stepped += sum(4 * p.numel() for p in copies)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    sequence = LOAD["sequence_length"] // settings.tensor_model_parallel_size
    hidden = torch.randn(sequence, LOAD["micro_batch_size"], SMALL.hidden_size, dtype=dtype)
    kept = {name: kept_by_layer(trainer.model, hidden.clone(), i) for i, name in enumerate(("lightning", "softmax"))}
    rank = dist.get_rank()
    return {
        "parallel": settings.model_dump(), "rank": rank, "load": LOAD, "bytes": before, "stepped": stepped, "kept": kept
    }  # fmt: skip


def main() -> None:
    from megatron.core import parallel_state

    for layout in LAYOUTS:
        line = json.dumps(measure(layout))
        for rank in range(2):
            if dist.get_rank() == rank:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    import m1.model  # noqa: F401  (prepares Megatron-core before its first import)

    main()
