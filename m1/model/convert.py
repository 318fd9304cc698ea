"""The hybrid's parameters and settings in the layout of transformers' `MiniMaxForCausalLM`, and back.

Three layouts differ. Megatron's softmax qkv is one weight, per key/value group its queries, its key and its value;
transformers has q, k and v apart. Megatron keeps one weight per expert; transformers stacks them. And the rotary
embedding: see `rope_parameters`. Lightning qkv (per head q, k, v), gate-and-up order in the experts, norms and router
are the same on both sides. Every conversion only moves rows, so a round trip is exact to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from m1.errors import UsageError
from m1.profile import Model

if TYPE_CHECKING:
    from transformers import MiniMaxConfig

#: Fixed in transformers' MiniMaxLightningAttention: the default of its norm, whatever rms_norm_eps says.
TRANSFORMERS_LIGHTNING_EPSILON = 1e-6

#: Persistent buffers of transformers' lightning layers, computed from the configuration and not stored.
DECAY_TABLES = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")

_WHOLE = {
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


def check_representable(model: Model) -> None:
    """Raise UsageError if transformers' MiniMax cannot compute what this model computes."""
    faults = []
    if model.num_attention_heads & (model.num_attention_heads - 1):
        faults.append(
            f"model.num_attention_heads={model.num_attention_heads} is not a power of two, for which transformers uses "
            "other decays in its lightning layers"
        )
    if model.lightning_norm_epsilon != TRANSFORMERS_LIGHTNING_EPSILON:
        faults.append(
            f"model.lightning_norm_epsilon={model.lightning_norm_epsilon} differs from the "
            f"{TRANSFORMERS_LIGHTNING_EPSILON} that is fixed in transformers' lightning layer"
        )
    rotated = _rotary_dim(model)
    # transformers counts the pairs from the fraction again, in floating point.
    if model.head_dim % 2 or not rotated or int(rotated / model.head_dim * model.head_dim // 2) * 2 != rotated:
        faults.append(
            f"model.rotary_percent={model.rotary_percent} of head_dim={model.head_dim} is not a number of pairs of "
            "channels that transformers' proportional rotary embedding can rotate"
        )
    if faults:
        raise UsageError(f"export: {'; '.join(faults)}", "Train a model with values that transformers knows.")


def rope_parameters(model: Model, rotary_base: float) -> dict[str, Any]:
    """Rotary settings that make transformers rotate part of each head, exactly as in training.

    transformers' `minimax` rotates all d channels of a head, channel i paired with i + d/2, and has no rotary_dim.
    Training rotates the first r = rotary_percent x d, channel i paired with i + r/2, at the angle
    position x base^(-2i/r). Its rope type "proportional" rotates the pairs i < r/2 at position x theta^(-2i/d) and
    leaves the others as they are, so theta = base^(d/r) gives the same angles, and `rotary_order` moves the channels
    of every query and key to where the pairs are expected. Scores do not change, as both sides move alike.
    """
    if _rotary_dim(model) == model.head_dim:
        return {"rope_type": "default", "rope_theta": float(rotary_base)}
    factor = _rotary_dim(model) / model.head_dim
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": factor,
        "rope_theta": float(rotary_base) ** (1 / factor),
    }


def rotary_order(model: Model) -> Tensor:
    """For each channel of a transformers query or key head, the channel of the trained head it holds; int64 (d,)."""
    half, dim = _rotary_dim(model) // 2, model.head_dim
    first = [*range(half), *range(2 * half, dim // 2 + half)]
    second = [*range(half, 2 * half), *range(dim // 2 + half, dim)]
    return torch.tensor(first + second)


def transformers_config(model: Model, rotary_base: float, **more: Any) -> MiniMaxConfig:
    """The `MiniMaxConfig` of this model; `more` sets further fields, such as the ids of special tokens.

    Raises:
        UsageError: transformers cannot represent the model.
    """
    from transformers import MiniMaxConfig

    check_representable(model)
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
    result = {new: _take(rest, old) for old, new in _WHOLE.items()}
    for layer in range(model.num_layers):
        source, target = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for old, new in _names(model, layer).items():
            result[target + new] = _take(rest, source + old)
        if model.is_softmax_layer(layer):
            fused = _take(rest, f"{source}self_attention.linear_qkv.weight")
            for name, weight in zip("qkv", _split_qkv(fused, model)):
                result[f"{target}self_attn.{name}_proj.weight"] = weight
        for old, new in _EXPERTS.items():
            each = [_take(rest, _expert(source, e, old)) for e in range(model.num_experts)]
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
    result = {old: _take(rest, new) for old, new in _WHOLE.items()}
    for layer in range(model.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for old, new in _names(model, layer).items():
            result[target + old] = _take(rest, source + new)
        if model.is_softmax_layer(layer):
            q, k, v = (_take(rest, f"{source}self_attn.{name}_proj.weight") for name in "qkv")
            result[f"{target}self_attention.linear_qkv.weight"] = _fuse_qkv(q, k, v, model)
        for old, new in _EXPERTS.items():
            stacked = _take(rest, f"{source}mlp.experts.{new}")
            for expert in range(model.num_experts):
                result[_expert(target, expert, old)] = stacked[expert].clone()
    _nothing_left(rest)
    return result


def _rotary_dim(model: Model) -> int:
    """Rotated channels of a head, as Megatron's RotaryEmbedding counts them."""
    return int(model.head_dim * model.rotary_percent)


def _names(model: Model, layer: int) -> dict[str, str]:
    return {**_LAYER, **(_SOFTMAX if model.is_softmax_layer(layer) else _LIGHTNING)}


def _expert(layer: str, expert: int, name: str) -> str:
    return f"{layer}mlp.experts.local_experts.{expert}.{name}.weight"


def _split_qkv(fused: Tensor, model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """(groups x (queries + 2) x d, hidden) -> q (heads x d, hidden), k and v (groups x d, hidden)."""
    groups, dim = model.num_query_groups, model.head_dim
    queries = model.num_attention_heads // groups
    whole = _shaped(fused, (groups * (queries + 2) * dim, model.hidden_size)).view(groups, queries + 2, dim, -1)
    order = rotary_order(model).to(fused.device)
    q, k, v = whole[:, :queries, order], whole[:, queries, order], whole[:, queries + 1]
    return q.reshape(-1, model.hidden_size), k.reshape(-1, model.hidden_size), v.reshape(-1, model.hidden_size).clone()


def _fuse_qkv(q: Tensor, k: Tensor, v: Tensor, model: Model) -> Tensor:
    groups, dim = model.num_query_groups, model.head_dim
    queries = model.num_attention_heads // groups
    back = torch.argsort(rotary_order(model)).to(q.device)
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
