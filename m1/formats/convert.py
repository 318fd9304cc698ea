"""The hybrid's parameters and settings in the layout of transformers' `MiniMaxForCausalLM`, and back.

Three layouts differ. Megatron's softmax qkv is one weight, per key/value group its queries, its key and its value;
transformers has q, k and v apart. Megatron keeps one weight per expert; transformers stacks them. And the rotary
embedding: see `m1.formats.layouts.rope_parameters`. Lightning qkv (per head q, k, v), gate-and-up order in the experts,
norms and router are the same on both sides. Every conversion only moves rows, so a round trip is exact to the bit.
For a model that is too large for this, and for files, see `m1.formats.mapping`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m1.config.model import Model
from m1.formats import layouts
from m1.formats.layouts import rope_parameters, rotary_dim

if TYPE_CHECKING:
    from transformers import MiniMaxConfig

#: Persistent buffers of transformers' lightning layers, computed from the configuration and not stored.
DECAY_TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")

#: Parameters outside the layers, Megatron's name -> the name in both stored layouts.
WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}
_LIGHTNING = {
    f"self_attention.{name}.weight": f"self_attn.{name}.weight"
    for name in ("qkv_proj", "output_gate", "norm", "out_proj")
}
_SOFTMAX = {"self_attention.linear_proj.weight": "self_attn.o_proj.weight"}
_EXPERTS = {"linear_fc1": "gate_up_proj", "linear_fc2": "down_proj"}


def rotary_order(model: Model) -> Tensor:
    """For each channel of a transformers query or key head, the channel of the trained head it holds; int64 (d,)."""
    half, dim = rotary_dim(model) // 2, model.head_dim
    first = [*range(half), *range(2 * half, dim // 2 + half)]
    second = [*range(half, 2 * half), *range(dim // 2 + half, dim)]
    return torch.tensor(first + second)


def transformers_config(model: Model, rotary_base: float, **more: Any) -> MiniMaxConfig:
    """The `MiniMaxConfig` of this model; `more` sets further fields, such as the ids of special tokens.

    Raises:
        UsageError: transformers cannot represent the model.
    """
    from transformers import MiniMaxConfig

    layouts.require_representable(model, layouts.TRANSFORMERS, rotary_base)
    kinds = ["full_attention" if model.is_softmax_layer(i) else "linear_attention" for i in range(model.num_layers)]
    factors: dict[str, Any] = {}
    for part in ("linear_attn", "full_attn", "mlp"):
        factors |= {f"{part}_alpha_factor": model.deepnorm_alpha, f"{part}_beta_factor": 1.0}
    return MiniMaxConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.moe_ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.moe_router_topk,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.norm_epsilon,
        layer_types=kinds,
        rope_parameters=rope_parameters(model, rotary_base),
        tie_word_embeddings=False,
        # A padding id would zero that token's embedding when transformers builds the model.
        pad_token_id=None,
        **factors,
        **more,
    )


def to_transformers(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """Parameters of the Megatron hybrid (whole, not split over ranks) under transformers' names and layouts.

    Args:
        state: name -> parameter as `HybridModel.named_parameters` or `state_dict` give them; `_extra_state` is ignored.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape than the model's settings say.
    """
    rest = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    result = {new: _take(rest, old) for old, new in WHOLE.items()}
    for layer in range(model.num_layers):
        source, target = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for old, new in plain_names(model, layer).items():
            result[target + new] = _take(rest, source + old)
        if model.is_softmax_layer(layer):
            fused = _take(rest, f"{source}self_attention.linear_qkv.weight")
            for name, weight in zip("qkv", split_qkv(fused, model, rotary_order(model))):
                result[f"{target}self_attn.{name}_proj.weight"] = weight
        for old, new in _EXPERTS.items():
            each = [_take(rest, source + expert_name(e, old)) for e in range(model.num_experts)]
            result[f"{target}mlp.experts.{new}"] = torch.stack(each)
    _nothing_left(rest)
    return result


def from_transformers(state: Mapping[str, Tensor], model: Model) -> dict[str, Tensor]:
    """The inverse of `to_transformers`: transformers' state dict as parameters of the Megatron hybrid.

    The weights must be those of a model with the configuration that `transformers_config` makes. The decay tables that
    transformers keeps beside its weights are ignored.

    Raises:
        ValueError: a parameter is missing, unknown or of another shape than the model's settings say.
    """
    rest = {name: value for name, value in state.items() if not name.endswith(DECAY_TABLES)}
    result = {old: _take(rest, new) for old, new in WHOLE.items()}
    for layer in range(model.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for old, new in plain_names(model, layer).items():
            result[target + old] = _take(rest, source + new)
        if model.is_softmax_layer(layer):
            q, k, v = (_take(rest, f"{source}self_attn.{name}_proj.weight") for name in "qkv")
            result[f"{target}self_attention.linear_qkv.weight"] = fuse_qkv(q, k, v, model, rotary_order(model))
        for old, new in _EXPERTS.items():
            stacked = _take(rest, f"{source}mlp.experts.{new}")
            for expert in range(model.num_experts):
                result[target + expert_name(expert, old)] = stacked[expert].clone()
    _nothing_left(rest)
    return result


def plain_names(model: Model, layer: int) -> dict[str, str]:
    """Parameters of a layer that are stored as they are: Megatron's name -> transformers', both within the layer."""
    return {**_LAYER, **(_SOFTMAX if model.is_softmax_layer(layer) else _LIGHTNING)}


def expert_name(expert: int, matrix: str) -> str:
    """Megatron's name of "linear_fc1" or "linear_fc2" of an expert, within its layer."""
    return f"mlp.experts.local_experts.{expert}.{matrix}.weight"


def split_qkv(fused: Tensor, model: Model, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused weight, the channels of each query and key head in `order`.

    (groups x (queries + 2) x d, hidden) -> q (heads x d, hidden), k and v (groups x d, hidden).
    """
    groups, dim = model.num_query_groups, model.head_dim
    queries = model.num_attention_heads // groups
    whole = _shaped(fused, (groups * (queries + 2) * dim, model.hidden_size)).view(groups, queries + 2, dim, -1)
    order = order.to(fused.device)
    q, k, v = whole[:, :queries, order], whole[:, queries, order], whole[:, queries + 1]
    return q.reshape(-1, model.hidden_size), k.reshape(-1, model.hidden_size), v.reshape(-1, model.hidden_size).clone()


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, model: Model, order: Tensor) -> Tensor:
    """The inverse of `split_qkv`, for all key/value groups or for a run of whole groups."""
    groups, dim = len(k) // model.head_dim, model.head_dim
    queries = model.num_attention_heads // model.num_query_groups
    back = torch.argsort(order).to(q.device)
    q = _shaped(q, (groups * queries * dim, model.hidden_size)).view(groups, queries, dim, -1)[:, :, back]
    k = _shaped(k, (groups * dim, model.hidden_size)).view(groups, 1, dim, -1)[:, :, back]
    v = _shaped(v, (groups * dim, model.hidden_size)).view(groups, 1, dim, -1)
    return torch.cat((q, k, v), dim=1).reshape(-1, model.hidden_size)


def _take(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(f"parameter {name} is missing; the weights belong to another model")
    return state.pop(name).detach()


def _shaped(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(weight.shape) != shape:
        raise ValueError(f"a qkv weight has shape {tuple(weight.shape)}, the model's settings say {shape}")
    return weight


def _nothing_left(state: Mapping[str, Tensor]) -> None:
    if state:
        raise ValueError(f"parameters that this model does not have: {', '.join(sorted(state)[:3])}; wrong settings?")
