"""The model of an exported `minimax-m1` folder, computed in plain torch from its files alone.

Written from the definition of the released MiniMax-M1 (`modeling_minimax_m1.py` and its config.json) and from nothing
of this project: names of tensors, queries, keys and values of a lightning layer interleaved by head, rotary embedding
on the first channels of a softmax head, router in float32. One sequence at a time, everything in float32. It is slow
and meant for checking: the released file itself needs code that is not part of any package.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

#: What layers remember: (key, value) of the softmax layers, state of the lightning layers.
State = list[Any]


class ReleasedModel:
    """A folder in the released layout; weights are read into memory as float32."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    self.weights[name] = opened.get_tensor(name).float()

    @torch.no_grad()
    def logits(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Logits (1, n, vocabulary) of tokens (1, n) that follow those of `state`, and the state after them."""
        config = self.config
        state = list(state) if state is not None else [None] * config["num_hidden_layers"]
        x = self.weights["model.embed_tokens.weight"][tokens[0]]
        for layer, kind in enumerate(config["attn_type_list"]):
            prefix = f"model.layers.{layer}."
            name = "full_attention" if kind == 1 else "linear_attention"
            mix = self._softmax if kind == 1 else self._lightning
            residual = self._norm(x, f"{prefix}input_layernorm.weight", config["rms_norm_eps"])
            mixed, state[layer] = mix(residual, layer, state[layer])
            x = residual * config[f"layernorm_{name}_alpha"] + mixed * config[f"layernorm_{name}_beta"]
            residual = self._norm(x, f"{prefix}post_attention_layernorm.weight", config["rms_norm_eps"])
            experts = self._experts(residual, f"{prefix}block_sparse_moe.")
            x = residual * config["layernorm_mlp_alpha"] + experts * config["layernorm_mlp_beta"]
        x = self._norm(x, "model.norm.weight", config["rms_norm_eps"])
        return F.linear(x, self.weights["lm_head.weight"])[None], state

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weights[name]

    def _project(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def _lightning(self, x: Tensor, layer: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence, token by token: S <- exp(-slope) S + k v^T, o = q S."""
        heads, dim = self.config["num_attention_heads"], self.config["head_dim"]
        prefix = f"model.layers.{layer}.self_attn."
        qkv = F.silu(self._project(x, f"{prefix}qkv_proj")).view(len(x), heads, 3, dim)
        q, k, v = qkv.unbind(2)
        depth = 1 - layer / (self.config["num_hidden_layers"] - 1) + 1e-5
        decay = torch.exp(-torch.tensor(_slopes(heads), dtype=torch.float32) * depth)[:, None, None]
        memory = torch.zeros(heads, dim, dim) if state is None else state
        outputs = torch.empty(len(x), heads, dim)
        for i in range(len(x)):
            memory = decay * memory + k[i, :, :, None] * v[i, :, None, :]
            outputs[i] = (q[i, :, None, :] @ memory)[:, 0]
        # The epsilon is the default of the released norm class; the configuration's is not passed to this norm.
        mixed = self._norm(outputs.flatten(1), f"{prefix}norm.weight", 1e-6)
        return self._project(
            torch.sigmoid(self._project(x, f"{prefix}output_gate")) * mixed, f"{prefix}out_proj"
        ), memory

    def _softmax(self, x: Tensor, layer: int, state: Any) -> tuple[Tensor, Any]:
        config, prefix = self.config, f"model.layers.{layer}.self_attn."
        heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        q = self._project(x, f"{prefix}q_proj").view(len(x), heads, dim).transpose(0, 1)
        k, v = (self._project(x, f"{prefix}{n}_proj").view(len(x), groups, dim).transpose(0, 1) for n in "kv")
        past = 0 if state is None else state[0].shape[1]
        positions = torch.arange(past, past + len(x))
        q, k = self._rotate(q, positions), self._rotate(k, positions)
        if state is not None:
            k, v = torch.cat((state[0], k), dim=1), torch.cat((state[1], v), dim=1)
        share = heads // groups  # head h attends to key/value head h // share
        scores = q @ k.repeat_interleave(share, dim=0).transpose(1, 2) / math.sqrt(dim)
        later = torch.arange(k.shape[1]) > positions[:, None]
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(share, dim=0)
        return self._project(mixed.transpose(0, 1).flatten(1), f"{prefix}o_proj"), (k, v)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of the first rotary_dim channels, pairs half of them apart; x (heads, n, head_dim)."""
        rotated = self.config["rotary_dim"]
        frequencies = 1.0 / self.config["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
        angles = torch.outer(positions.float(), frequencies)
        low, high, rest = x.split((rotated // 2, rotated // 2, x.shape[-1] - rotated), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)

    def _experts(self, x: Tensor, prefix: str) -> Tensor:
        """softmax over all experts, the best k, renormalised; w2(silu(w1 x) * w3 x)."""
        probability = self._project(x, f"{prefix}gate").softmax(-1)
        best, chosen = probability.topk(self.config["num_experts_per_tok"], dim=-1)
        best = best / best.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert in range(self.config["num_local_experts"]):
            row, place = (chosen == expert).nonzero(as_tuple=True)
            if len(row):
                name, z = f"{prefix}experts.{expert}.", x[row]
                inner = F.silu(self._project(z, f"{name}w1")) * self._project(z, f"{name}w3")
                out[row] += self._project(inner, f"{name}w2") * best[row, place, None]
        return out


def _slopes(heads: int) -> list[float]:
    """ALiBi's series: 2^(-8h/H) for a power of two, else that of the power below and every second of the one above."""
    power = 2 ** math.floor(math.log2(heads))
    series = [2.0 ** (-8.0 * (h + 1) / power) for h in range(power)]
    return series if power == heads else series + _slopes(2 * power)[0::2][: heads - power]
