"""Checkpoint layouts that other programs read, and what each can say. No torch.

Two layouts. `transformers` is what `MiniMaxForCausalLM` reads; `minimax-m1` is the released one of MiniMax-Text-01 and
MiniMax-M1 (`MiniMaxM1ForCausalLM`), which vLLM reads too. Tensors have the same names and, but for the order of rotary
channels (`m1.formats.mapping`), the same contents; `config.json` differs.
"""

from __future__ import annotations

from typing import Any

from m1.config.model import Model
from m1.errors import UsageError

TRANSFORMERS, MINIMAX_M1 = "transformers", "minimax-m1"

#: Epsilon of the lightning layers' norm: no configuration has it. transformers' port and the released modelling file
#: both leave it at the default of their norm class, whatever rms_norm_eps says.
LIGHTNING_EPSILON = 1e-6


#: Field of the profile's model section -> key of config.json, the same in both layouts.
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "num_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "norm_epsilon": "rms_norm_eps",
}
NAMES = {
    "minimax": TRANSFORMERS,
    "MiniMaxForCausalLM": TRANSFORMERS,
    # The released config.json and its configuration class spell the type differently.
    **dict.fromkeys(("minimax_m1", "MiniMaxM1", "MiniMaxM1ForCausalLM"), MINIMAX_M1),
    **dict.fromkeys(("minimax_text_01", "MiniMaxText01", "MiniMaxText01ForCausalLM"), MINIMAX_M1),
}
FACTORS = {
    TRANSFORMERS: [f"{part}_%s_factor" for part in ("linear_attn", "full_attn", "mlp")],
    MINIMAX_M1: [f"layernorm_{part}_%s" for part in ("linear_attention", "full_attention", "mlp")],
}


def rotary_dim(model: Model) -> int:
    """Rotated channels of a head, as Megatron's RotaryEmbedding counts them."""
    return int(model.head_dim * model.rotary_percent)


def unrepresentable(model: Model, layout: str) -> list[str]:
    """What the programs that read `layout` would compute differently from this model, one clause each."""
    faults, rotated = [], rotary_dim(model)
    if model.lightning_norm_epsilon != LIGHTNING_EPSILON:
        faults.append(
            f"model.lightning_norm_epsilon={model.lightning_norm_epsilon} differs from the {LIGHTNING_EPSILON} that is "
            "fixed in the lightning layer of those who read it"
        )
    if not rotated:
        faults.append(f"model.rotary_percent={model.rotary_percent} of head_dim={model.head_dim} rotates nothing")
    if layout == MINIMAX_M1:
        if model.num_layers == 1:
            faults.append("model.num_layers=1: the released code divides by the number of layers minus one")
        return faults
    if model.num_attention_heads & (model.num_attention_heads - 1):
        faults.append(
            f"model.num_attention_heads={model.num_attention_heads} is not a power of two, for which transformers uses "
            "other decays in its lightning layers"
        )
    # transformers counts the pairs from the fraction again, in floating point.
    if rotated and (model.head_dim % 2 or int(rotated / model.head_dim * model.head_dim // 2) * 2 != rotated):
        faults.append(
            f"model.rotary_percent={model.rotary_percent} of head_dim={model.head_dim} is not a number of pairs of "
            "channels that transformers' proportional rotary embedding can rotate"
        )
    return faults


def rope_parameters(model: Model, rotary_base: float) -> dict[str, Any]:
    """Rotary settings that make transformers rotate part of each head, exactly as in training.

    transformers' `minimax` rotates all d channels of a head, channel i paired with i + d/2, and has no rotary_dim.
    Training rotates the first r = rotary_percent x d, channel i paired with i + r/2, at the angle
    position x base^(-2i/r). Its rope type "proportional" rotates the pairs i < r/2 at position x theta^(-2i/d) and
    leaves the others as they are, so theta = base^(d/r) gives the same angles, and `m1.formats.convert.rotary_order`
    moves the channels of every query and key to where the pairs are expected. Scores do not change, as both sides move
    alike.
    """
    if rotary_dim(model) == model.head_dim:
        return {"rope_type": "default", "rope_theta": float(rotary_base)}
    factor = rotary_dim(model) / model.head_dim
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": factor,
        "rope_theta": float(rotary_base) ** (1 / factor),
    }


def minimax_m1_config(model: Model, rotary_base: float, dtype: str, **more: Any) -> dict[str, Any]:
    """`config.json` of the released layout (keys and their meaning: released configuration of MiniMax-M1).

    The released modelling code rotates the first `rotary_dim` channels of a head, channel i paired with
    i + rotary_dim/2, as training does: no channel moves.

    Raises:
        UsageError: the layout cannot represent the model.
    """
    require_representable(model, MINIMAX_M1, rotary_base)
    factors: dict[str, float] = {}
    for name in FACTORS[MINIMAX_M1]:
        factors |= {name % "alpha": model.deepnorm_alpha, name % "beta": 1.0}
    return {
        "architectures": ["MiniMaxM1ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
        "model_type": "minimax_m1",
        **{key: getattr(model, field) for field, key in FIELDS.items()},
        "attn_type_list": [int(model.is_softmax_layer(layer)) for layer in range(model.num_layers)],
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rope_theta": int(rotary_base),
        "rotary_dim": rotary_dim(model),
        **factors,
        "postnorm": True,
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        # Read by the released code when it builds the model; neither changes what it computes.
        "router_aux_loss_coef": 0.001,
        "initializer_range": 0.02,
        "output_router_logits": False,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        **more,
    }


def require_representable(model: Model, layout: str, rotary_base: float) -> None:
    """Raise UsageError unless those who read `layout` compute what this model computes."""
    faults = unrepresentable(model, layout)
    if layout == MINIMAX_M1 and rotary_base != int(rotary_base):
        faults.append(f"the RoPE base {rotary_base!r} is not a whole number, and vLLM's loader cuts it to one")
    if faults:
        raise UsageError(
            f"export.layout={layout}: {'; '.join(faults)}", f"Train a model with values that {layout} knows."
        )
