"""One rank of the context-parallel test: ``python lightning_ranks.py RANK SIZE FOLDER``; writes findings as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning_cases import make_inputs

from kernels import lightning_attention
from kernels.context_parallel import lightning_attention_context_parallel

CASES = {
    "contiguous": {"layout": "contiguous", "batch": 2},
    "zigzag": {"layout": "zigzag", "batch": 2},
    "contiguous-packed": {"layout": "contiguous", "offsets": [0, 5, 40, 144, 150, 240]},
    "zigzag-packed": {"layout": "zigzag", "offsets": [0, 5, 40, 144, 150, 240]},
    "packed-on-chunk-boundaries": {"layout": "zigzag", "offsets": [0, 60, 120, 150, 180, 240]},
    "bf16": {"layout": "contiguous", "dtype": torch.bfloat16},
}
LENGTH = 240


def local_part(x, rank, size, layout):
    if layout == "contiguous":
        return x.chunk(size, dim=2)[rank]
    chunks = x.chunk(2 * size, dim=2)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim=2)


def error(case, size, rank, group):
    layout = case["layout"]
    inputs = make_inputs(LENGTH, initial=False, **{k: v for k, v in case.items() if k != "layout"})
    tokens = (inputs.q, inputs.k, inputs.v)
    whole = lightning_attention(*tokens, inputs.slopes, cu_seqlens=inputs.cu_seqlens)
    wanted = [whole, *torch.autograd.grad(whole, tokens, inputs.grad_out)]
    mine = [local_part(x.detach(), rank, size, layout).requires_grad_() for x in tokens]
    out = lightning_attention_context_parallel(
        *mine, inputs.slopes, group=group, layout=layout, cu_seqlens=inputs.cu_seqlens
    )
    found = [out, *torch.autograd.grad(out, mine, local_part(inputs.grad_out, rank, size, layout))]
    parts = [local_part(x, rank, size, layout) for x in wanted]
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(found, parts))


def messages(length, group):
    """Bytes of every all-gather of one forward and backward pass."""
    sent, gather = [], dist.all_gather_into_tensor

    def counting(output, tensor, group=None):
        sent.append(tensor.numel() * tensor.element_size())
        return gather(output, tensor, group=group)

    dist.all_gather_into_tensor = counting
    inputs = make_inputs(length, initial=False)
    out = lightning_attention_context_parallel(
        inputs.q, inputs.k, inputs.v, inputs.slopes, group=group, layout="zigzag"
    )
    out.sum().backward()
    dist.all_gather_into_tensor = gather
    return sent


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    found = {}
    for size in (1, 2, 4):
        # Every rank takes part in making every group.
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        for name, case in CASES.items():
            found[f"{size}-{name}"] = error(case, size, rank % size, groups[rank // size])
    found["messages"] = [messages(length, None) for length in (16, 512)]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
