"""The MiniMax-Text-01 / M1 hybrid on Megatron-core (MiniMax-01, arXiv 2501.08313 §2; released modelling files).

Every layer: y = norm(x); h = alpha y + attention(y); z = norm(h); out = alpha z + MoE(z), with alpha = (2N)^(1/4). The
residual is the normed value (post-norm with DeepNorm). Every eighth layer has softmax attention with grouped queries
and RoPE on half of each head, the others lightning attention. Router and LM head compute in float32.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from m1.config.model import Model
from m1.config.parallel import Parallel
from m1.model.attention import LightningAttention, LightningSettings, SoftmaxCore
from m1.model.experts import Experts
from m1.model.norm import RMSNorm
from m1.model.router import HybridRouter


class HybridLayer(TransformerLayer):
    """A Megatron layer whose residual is the normed input, scaled by DeepNorm's alpha."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (sequence, batch, hidden); padding_mask (batch, sequence), True where padded."""
        alpha = self.config.deepnorm_alpha  # type: ignore[attr-defined]
        y = self.input_layernorm(hidden_states)
        attended, _bias = self.self_attention(
            y, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params
        )
        z = self.pre_mlp_layernorm(attended, residual=y, alpha=alpha)
        mixed, _bias = self.mlp(z, padding_mask=padding_mask)
        return torch.add(mixed, z, alpha=alpha), None


class Float32Head(ColumnParallelLinear):
    """LM head with float32 weights and arithmetic: MiniMax-M1 report §3.2, Fig. 3 (rollout and training agree)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.params_dtype = torch.float32
        super().__init__(*args, config=config, **kwargs)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """(sequence, batch, hidden) -> (sequence, batch, vocabulary)."""
        if self.sequence_parallel:
            return super().forward(input_.float(), *args, **kwargs)
        # Megatron turns the logits to (batch, sequence, vocabulary): a copy, which turning the input makes needless.
        logits, bias = super().forward(input_.float().transpose(0, 1).contiguous(), *args, **kwargs)
        return logits.transpose(0, 1), bias


class HybridModel(GPTModel):
    """Megatron's GPT model with the hybrid's layers and a float32 head."""

    def __init__(self, config: TransformerConfig, model: Model, rotary_base: float, **kwargs: Any) -> None:
        super().__init__(
            config,
            _block_spec(config, model, kwargs.get("vp_stage")),
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type="rope",
            rotary_percent=model.rotary_percent,
            rotary_base=rotary_base,  # type: ignore[arg-type]
            share_embeddings_and_output_weights=False,
            **kwargs,
        )
        self.settings = model
        self.rotary_base = rotary_base
        if self.post_process:
            self.output_layer = Float32Head(
                config.hidden_size, self.vocab_size, config=config, init_method=config.init_method, bias=False,
                skip_bias_add=False, gather_output=not self.parallel_output, tp_group=self.pg_collection.tp,
            )  # fmt: skip

    def _preprocess(  # type: ignore[override]
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        padding_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        """Embedding, rotary angles and this rank's padding mask.

        Angles come from the positions given, which is all that packing and context parallelism ask of them. Every row
        of a batch has the same positions.
        """
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if padding_mask is not None and self.config.sequence_parallel:
            tensor = self.pg_collection.tp
            padding_mask = padding_mask.chunk(tensor.size(), dim=1)[tensor.rank()]
        rotary = self.rotary_pos_emb
        if rotary.inv_freq.device != position_ids.device:
            rotary.inv_freq = rotary.inv_freq.to(position_ids.device)
        angles = torch.outer(position_ids[0].to(rotary.inv_freq.dtype), rotary.inv_freq)
        return decoder_input, torch.cat((angles, angles), dim=-1)[:, None, None], None, None, None, padding_mask

    def set_rotary_base(self, base: float) -> None:
        """Change the RoPE base in place (context extension)."""
        self.rotary_base = base
        self.rotary_pos_emb = RotaryEmbedding(
            kv_channels=self.config.kv_channels,
            rotary_percent=self.rotary_percent,
            rotary_base=base,  # type: ignore[arg-type]
            cp_group=self.pg_collection.cp,
        )


def megatron_config(model: Model, parallel: Parallel) -> TransformerConfig:
    """Megatron's configuration of the hybrid. Losses are normalised by the number of tokens in the global batch."""
    dtype = torch.bfloat16 if parallel.precision == "bf16" else torch.float32
    interleaved = parallel.virtual_pipeline_model_parallel_size > 1
    recompute: dict[str, Any] = {}
    if parallel.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.moe_router_topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # HybridRouter has its own
        moe_token_dispatcher_type=parallel.token_dispatcher,
        moe_expert_capacity_factor=parallel.moe_expert_capacity_factor,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=parallel.precision == "bf16",
        calculate_per_token_loss=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size if interleaved else None,
        pipeline_model_parallel_layout=_pipeline_layout(parallel),
        # Two ranks that are each other's next and previous would mix up the messages of one batch of them.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        hetereogenous_dist_checkpoint=True,
        **recompute,
    )
    config.deepnorm_alpha = model.deepnorm_alpha  # type: ignore[attr-defined]
    return config


def _pipeline_layout(parallel: Parallel) -> list[list[str]] | None:
    """Megatron's description of the layers that each stage holds, or None for equally many."""
    if parallel.pipeline_layers is None:
        return None
    stages = [["decoder"] * count for count in parallel.pipeline_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def _block_spec(config: TransformerConfig, model: Model, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layer specs of this pipeline rank: softmax attention in every `softmax_every`-th layer, lightning elsewhere."""
    moe = get_moe_module_spec(use_te=False, num_experts=model.num_experts, moe_grouped_gemm=False)
    moe.submodules.router = HybridRouter
    moe.submodules.experts.module = Experts
    softmax = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SoftmaxCore,
            linear_proj=RowParallelLinear,
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    settings = LightningSettings(
        model.num_attention_heads, model.head_dim, model.num_layers, model.lightning_norm_epsilon
    )
    lightning = ModuleSpec(module=LightningAttention, params={"settings": settings})

    def layer(index: int) -> ModuleSpec:
        attention = softmax if model.is_softmax_layer(index) else lightning
        submodules = TransformerLayerSubmodules(
            input_layernorm=RMSNorm, self_attention=attention, pre_mlp_layernorm=RMSNorm, mlp=moe
        )
        return ModuleSpec(module=HybridLayer, submodules=submodules)

    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer(first + i) for i in range(count)], layer_norm=RMSNorm)


def build_model(
    model: Model,
    parallel: Parallel,
    *,
    seed: int,
    rotary_base: float | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> HybridModel:
    """A freshly initialised hybrid on this rank. Weights depend on `seed` alone, not on the parallel layout.

    Args:
        pre_process, post_process: whether this part of the model has the embedding, and the head.
        vp_stage: which of this rank's parts, under the interleaved schedule.
    """
    config = megatron_config(model, parallel)
    hybrid = HybridModel(
        config,
        model,
        rotary_base or model.rotary_base,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        vp_stage=vp_stage,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    hybrid.cuda(torch.cuda.current_device())  # Megatron makes its routers on the host
    initialize_weights(hybrid, seed)
    return hybrid


@torch.no_grad()
def initialize_weights(hybrid: HybridModel, seed: int) -> None:
    """Xavier-normal weights with DeepNorm's scale on values, outputs and experts (MiniMax-01 §4.2); norms at one.

    Every weight is drawn whole from a generator seeded by (seed, global name) and then cut to this rank's part, so
    that one seed gives one model at every layout. On the meta device there is nothing to draw.
    """
    if next(hybrid.parameters()).is_meta:
        return
    beta = hybrid.settings.deepnorm_beta
    for name, parameter in hybrid.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        split = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        expert = ".experts." in name
        group = hybrid.pg_collection.expt_tp if expert else hybrid.pg_collection.tp
        shape = list(parameter.shape)
        if split >= 0:
            shape[split] *= group.size()
        generator = torch.Generator().manual_seed(_seed_of(seed, global_name(hybrid, name)))
        whole = torch.randn(shape, generator=generator)
        whole *= (2.0 / (shape[0] + shape[1])) ** 0.5
        if any(part in name for part in ("out_proj", "linear_proj", "linear_fc1", "linear_fc2")):
            whole *= beta
        elif "qkv" in name:
            _value_rows(whole, name, hybrid.settings).mul_(beta)
        if split >= 0:
            halves = whole.chunk(2) if "linear_fc1" in name else (whole,)  # gate and up are split one by one
            whole = torch.cat([half.chunk(group.size(), dim=split)[group.rank()] for half in halves])
        parameter.copy_(whole)


def _value_rows(weight: Tensor, name: str, model: Model) -> Tensor:
    """View of the rows of a fused qkv weight that make the values."""
    if "qkv_proj" in name:  # lightning: (heads, 3, head_dim)
        return weight.view(model.num_attention_heads, 3, model.head_dim, -1)[:, 2]
    per_group = model.num_attention_heads // model.num_query_groups + 2  # Megatron: (groups, queries + k + v, head_dim)
    return weight.view(model.num_query_groups, per_group, model.head_dim, -1)[:, -1]


def global_name(hybrid: HybridModel, name: str) -> str:
    """Name of a parameter with layer and expert numbers counted over all ranks."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(hybrid.decoder.layers[int(parts[at])].layer_number - 1)
    if "local_experts" in parts:
        at = parts.index("local_experts") + 1
        group = hybrid.pg_collection.ep
        local = hybrid.settings.num_experts // group.size()
        parts[at] = str(int(parts[at]) + group.rank() * local)
    return ".".join(parts)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1
