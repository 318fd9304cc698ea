"""Typed configuration: one YAML file describes a whole run.

Every section is named after the stage that owns it. Unknown fields, wrong types and impossible combinations are
refused with the file, the field, the value and what is allowed, before anything starts. This module imports neither
torch nor Prefect, so that every command can read a profile at once.
"""

from __future__ import annotations

import difflib
import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AliasGenerator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from m1 import layout, paths
from m1.errors import UsageError

DATA_STAGES = ("corpus", "tokenizer", "tokens", "sft-data", "synthesize")
TRAINING_STAGES = ("pretrain", "sft", "context-extension", "rl-40k", "rl-80k")
STAGES = ("corpus", "tokenizer", "tokens", "sft-data", "pretrain", "sft", "context-extension", "synthesize",
          "rl-40k", "rl-80k", "evaluate", "export")  # fmt: skip
#: What a stage reads besides its parent checkpoint; each must come earlier in the order.
READS: dict[str, tuple[str, ...]] = {
    "corpus": (),
    "tokenizer": ("corpus",),
    "tokens": ("corpus", "tokenizer"),
    "sft-data": ("tokenizer",),
    "synthesize": ("tokenizer", "sft-data"),
    "pretrain": ("tokenizer", "tokens"),
    "sft": ("tokenizer", "tokens", "sft-data"),
    "context-extension": ("tokenizer", "tokens", "sft-data"),
    "rl-40k": ("tokenizer", "synthesize"),
    "rl-80k": ("tokenizer", "synthesize"),
    "evaluate": ("tokenizer", "synthesize"),
    "export": ("tokenizer", "tokens"),
}


def _refuse(broken: list[str]) -> None:
    """Make validation fail with these rules, if there are any."""
    if broken:
        raise ValueError("; ".join(broken))


class Section(BaseModel):
    """A part of a profile: unknown fields are errors, values are frozen, nothing is coerced from another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """The hybrid of lightning and softmax attention (MiniMax-01, arXiv 2501.08313 §2)."""

    num_layers: int = Field(ge=1)
    softmax_every: int = Field(8, ge=1, description="every n-th layer has softmax attention, the others lightning")
    hidden_size: int = Field(ge=8)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int = Field(ge=1, description="key/value heads of the softmax layers")
    head_dim: int = Field(ge=4)
    num_experts: int = Field(ge=2)
    moe_router_topk: int = Field(2, ge=2, description="the chosen experts' probabilities are renormalised")
    moe_ffn_hidden_size: int = Field(ge=8)
    vocab_size: int = Field(ge=300)
    rotary_percent: float = Field(0.5, gt=0, le=1)
    rotary_base: float = Field(10_000.0, gt=1)
    norm_epsilon: float = Field(1e-5, gt=0)
    lightning_norm_epsilon: float = Field(1e-6, gt=0)
    max_position_embeddings: int = Field(ge=16)
    init_beta: float | None = Field(None, gt=0, description="initialisation scale; by default DeepNorm's (8N)^(-1/4)")

    @property
    def deepnorm_alpha(self) -> float:
        """Residual factor (2N)^(1/4) of DeepNorm for N layers."""
        return (2 * self.num_layers) ** 0.25

    @property
    def deepnorm_beta(self) -> float:
        """Scale of values, outputs and experts at initialisation; not a factor of the forward pass."""
        return self.init_beta or (8 * self.num_layers) ** -0.25

    def is_softmax_layer(self, layer_index: int) -> bool:
        """Whether the layer with this 0-based index has softmax attention."""
        return (layer_index + 1) % self.softmax_every == 0

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.moe_router_topk > self.num_experts:
            raise ValueError(f"moe_router_topk={self.moe_router_topk} exceeds num_experts={self.num_experts}")
        if int(self.head_dim * self.rotary_percent) % 2:
            raise ValueError(f"rotary_percent={self.rotary_percent} of head_dim={self.head_dim} is not an even number")
        return self


class Parallel(Section):
    """Parallel layout of the training stages; the data-parallel size is what remains of the world size.

    `m1.layout` has the rules; a tensor-parallel layout is sequence-parallel as well.
    """

    world_size: int = Field(1, ge=1)
    threads_per_rank: int = Field(1, ge=1)
    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    virtual_pipeline_model_parallel_size: int = Field(
        1, ge=1, description="parts of the model that a pipeline rank holds; above 1, the schedule is interleaved"
    )
    pipeline_layers: list[Annotated[int, Field(ge=1)]] | None = Field(
        None, description="layers of each stage, pipeline x virtual pipeline many; by default equally many"
    )
    context_parallel_size: int = Field(1, ge=1)
    expert_model_parallel_size: int = Field(1, ge=1)
    expert_tensor_parallel_size: int = Field(1, ge=1)
    moe_token_dispatcher: Literal["alltoall", "allgather"] | None = Field(
        None, description="how tokens reach experts; by default all-to-all where experts are apart, else all-gather"
    )
    moe_expert_capacity_factor: float | None = Field(
        None, gt=0, description="an expert takes at most this many times its even share of a rank's micro-batch; "
        "tokens above it are dropped, the least probable first. By default none is"
    )  # fmt: skip
    moe_aux_loss_counts: Literal["global", "running"] = Field(
        "global", description="over what the auxiliary loss counts tokens. global: the global batch; where a rank has "
        "several micro-batches, a forward pass without gradients counts first. running: its micro-batches so far"
    )  # fmt: skip
    recompute: Literal["none", "full"] = Field(
        "none", description="full: keep only the input of every layer and compute the rest again backwards"
    )
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    @property
    def token_dispatcher(self) -> Literal["alltoall", "allgather"]:
        return self.moe_token_dispatcher or ("alltoall" if self.expert_model_parallel_size > 1 else "allgather")

    @model_validator(mode="after")
    def _divides(self) -> Parallel:
        _refuse(layout.world_size_rules(self))
        return self


class Optimizer(Section):
    """AdamW. The defaults are the reinforcement-learning values of the MiniMax-M1 report §3.2."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-15, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_grad: float = Field(1.0, gt=0)
    #: Rate of the last norm's gain over that of all other weights. The gain scales the logits: it is the policy's
    #: inverse temperature. A matrix's entry is of order 1/sqrt(width), a gain of order 1 (see muP, arXiv 2203.03466).
    final_norm_lr_mult: float = Field(1.0, gt=0)


class LearningRate(Section):
    """Warm-up, constant phase, decay. Fractions are of the stage's steps."""

    max: float = Field(gt=0)
    min: float = Field(0.0, ge=0)
    warmup_fraction: float = Field(0.0, ge=0, le=1)
    constant_fraction: float = Field(0.0, ge=0, le=1)
    decay: Literal["linear", "cosine", "exponential", "none"] = "cosine"

    @model_validator(mode="after")
    def _ordered(self) -> LearningRate:
        if self.min > self.max:
            raise ValueError(f"min={self.min} exceeds max={self.max}")
        if self.warmup_fraction + self.constant_fraction > 1:
            raise ValueError("warmup_fraction + constant_fraction exceeds 1")
        if self.decay == "exponential" and self.min == 0:
            raise ValueError("an exponential decay needs min above 0")
        return self

    def at(self, step: int, total_steps: int) -> float:
        """Learning rate of 0-based `step` out of `total_steps`."""
        warmup = self.warmup_fraction * total_steps
        if step < warmup:
            return self.max * (step + 1) / max(1.0, math.ceil(warmup))
        decay_start = warmup + self.constant_fraction * total_steps
        if self.decay == "none" or step < decay_start:
            return self.max
        progress = (step - decay_start + 1) / max(1.0, total_steps - decay_start)
        progress = min(1.0, progress)
        if self.decay == "linear":
            return self.max + (self.min - self.max) * progress
        if self.decay == "exponential":
            return self.max * (self.min / self.max) ** progress
        return self.min + (self.max - self.min) * 0.5 * (1 + math.cos(math.pi * progress))


class Corpus(Section):
    """Raw text: which sources, how they are cleaned and de-duplicated."""

    spec: str = Field(description="name of a file in data_specs/, without .yaml")
    max_megabytes: float = Field(gt=0, description="clean text kept, in 10^6 bytes, over all sources")


class Tokenizer(Section):
    """Byte-level BPE trained on the corpus. Its vocabulary size is `model.vocab_size`."""

    train_megabytes: float = Field(gt=0)


class Tokens(Section):
    """Megatron indexed data sets."""

    heldout_fraction: float = Field(gt=0, lt=0.5)


class TaskRange(Section):
    """Inclusive range of difficulty levels, 1 the easiest."""

    min_difficulty: int = Field(1, ge=1, le=10)
    max_difficulty: int = Field(ge=1, le=10)

    @model_validator(mode="after")
    def _ordered(self) -> TaskRange:
        if self.min_difficulty > self.max_difficulty:
            raise ValueError(f"min_difficulty={self.min_difficulty} exceeds max_difficulty={self.max_difficulty}")
        return self


class SftData(Section):
    """Worked answers from the task generators."""

    samples_per_task: int = Field(ge=1)
    direct_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of the samples whose think block is empty: the answer without reasoning"
    )
    tasks: dict[str, TaskRange]


class SweTasks(Section):
    """Software-engineering tasks from real packages, run in the sandbox; which are held out is said in the spec."""

    spec: str = Field("swe", description="file in data_specs, without .yaml")
    packages: list[str] = Field([], description="sources of the spec; all of them if empty")
    faults_per_package: int = Field(ge=1)
    question_length: int = Field(4096, ge=64, description="tokens; code is cut to what fits")
    when_no_engine: Literal["skip", "fail"] = Field(
        "skip",
        description="where no usable Docker engine answers: every stage leaves its part out and says so, or fails",
    )


class Synthesize(Section):
    """Prompts for reinforcement learning and held-out prompts, disjoint by content from each other and from SFT."""

    train_prompts_per_task: int = Field(ge=1)
    heldout_prompts_per_task: int = Field(ge=1)
    tasks: dict[str, TaskRange]
    swe: SweTasks | None = None


class Training(Section):
    """What every gradient-based stage has. Tokens and steps count the whole data-parallel world."""

    sequence_length: int = Field(ge=16)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    checkpoint_every: int = Field(ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1)


class Pretrain(Training):
    init_from: str | None = Field(
        None,
        min_length=1,
        description="folder of a base model in safetensors; without it training starts from the seed",
    )
    train_steps: int = Field(ge=1)
    evaluate_every: int = Field(ge=1)


class TextReplay(Section):
    """Pretraining text among the answers, so that the language model is not forgotten over them.

    Every sequence carries a pass key that is asked for several times: the skill that context extension lengthens.
    """

    every: int = Field(ge=1, description="steps from one replay to the next")
    sequences: int = Field(ge=1)
    sequence_length: int = Field(ge=16)
    questions: int = Field(ge=1, description="how often a sequence asks for its pass key")
    weight: float = Field(1.0, gt=0, description="loss weight of a token against 1 for an answer's")
    question_weight: float = Field(1.0, gt=0, description="loss weight of a pass key, in the same measure")


class Sft(Training):
    epochs: float = Field(gt=0)
    packed: bool = Field(False, description="samples of a micro-batch end to end in one row, instead of padded")
    text: TextReplay | None = Field(None, description="pretraining text replayed among the answers")
    evaluate_every: int = Field(ge=1)


class ExtensionStage(Section):
    """One step of the context extension."""

    sequence_length: int = Field(ge=16)
    rotary_base: float = Field(gt=1)
    train_steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int = Field(ge=1)


class ContextExtension(Section):
    """Four stages, each at least doubling the length (MiniMax-M1 report §2.1)."""

    stages: list[ExtensionStage] = Field(min_length=1)
    questions_per_sequence: int = Field(ge=1, description="how often a sequence asks for its pass key")
    answer_weight: float = Field(
        1.0, ge=1, description="loss weight of an answer's token, retrieved or replayed, against 1 for plain text"
    )
    probes: int = Field(ge=1, description="sequences with one question each, asked after every stage")
    replay_samples: int = Field(0, ge=0, description="worked answers added to every step when SFT came before")
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    log_every: int = Field(5, ge=1)
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints within a stage; after each stage there is one in any case"
    )
    max_gradient_norm: float = Field(gt=0, description="a norm above this stops the stage: the recipe's known failure")

    @model_validator(mode="after")
    def _doubling(self) -> ContextExtension:
        lengths = [stage.sequence_length for stage in self.stages]
        for short, long in itertools.pairwise(lengths):
            if long < 2 * short:
                raise ValueError(f"stages: sequence_length {long} is less than twice the {short} before it")
        return self


class Rewards(Section):
    """Rule rewards: correctness needs format; the weights are this project's choice (the paper's are not published)."""

    correct: float = 1.0
    format: float = Field(0.1, ge=0, description="added when think and answer tags are well formed")
    overlong_cache: int = Field(ge=1, description="tokens before the window's end where the soft penalty begins")
    overlong_penalty: float = Field(1.0, ge=0)


class SwePrompts(Section):
    """How a stage puts software-engineering tasks to the model and has the answers judged in the sandbox."""

    max_prompt_length: int = Field(
        ge=64, description="tokens; at least synthesize.swe.question_length, the chat's own tokens come on top"
    )
    workers: int = Field(2, ge=1, description="answers that each rank has judged side by side")
    test_seconds: float = Field(300.0, gt=0, description="limit of one run of an answer's tests")


class RlSwe(SwePrompts):
    share: float = Field(gt=0, le=1, description="of the prompts that are rolled out, in every batch")


class EvaluateSwe(SwePrompts):
    tasks_per_kind: int = Field(ge=1, description="of the held-out packages, for each of repair, localise, write-test")
    samples_per_task: int = Field(1, ge=1)
    max_new_tokens: int | None = Field(None, ge=1, description="by default evaluate.max_new_tokens")


class Cispo(Section):
    """CISPO (MiniMax-M1 report §3.1, Eq. 4-5). Bounds are absolute values of the importance ratio, not 1 + eps."""

    is_weight_max: float = Field(gt=0)
    is_weight_min: float | None = Field(None, ge=0)


class Repetition(Section):
    """Early stop: this many consecutive tokens, each above the probability (report §3.2: 3000 and 0.99)."""

    consecutive_tokens: int = Field(ge=1)
    probability: float = Field(0.99, gt=0, lt=1)


class WindowCriteria(Section):
    """When to move to the next output window (report §5; the thresholds are not published and chosen here)."""

    perplexity_change: float = Field(
        gt=0, description="relative change of the perplexity over `patience` steps below this"
    )
    length_fraction: float = Field(gt=0, le=1, description="99th percentile of length at least this part of the window")
    patience: int = Field(ge=1)
    max_steps: int = Field(ge=1, description="move on after this many steps in any case, and say so")


class Rl(Section):
    """One reinforcement-learning stage. Windows are output lengths in tokens."""

    windows: list[int] = Field(min_length=1)
    train_steps: int = Field(ge=1, description="batches of rollouts")
    prompts_per_step: int = Field(ge=1)
    group_size: int = Field(ge=2)
    updates_per_step: int = Field(ge=1, description="optimizer steps per batch of rollouts; above 1 is off-policy")
    max_generation_rounds: int = Field(ge=1, description="dynamic sampling: rounds before a smaller batch is taken")
    micro_batch_size: int = Field(ge=1, description="responses of a micro-batch, at most")
    max_prompt_length: int = Field(ge=8)
    swe: RlSwe | None = None
    temperature: float = Field(1.0, gt=0)
    objective: Literal["cispo"] = "cispo"
    cispo: Cispo
    rewards: Rewards
    repetition: Repetition
    advance: WindowCriteria | None = None
    max_solve_rate: float | None = Field(
        None, gt=0, le=1, description="drop prompts the parent solves more often than this"
    )
    learning_rate: LearningRate
    optimizer: Optimizer = Optimizer()
    moe_aux_loss_coeff: float = Field(0.0, ge=0)
    checkpoint_every: int = Field(ge=1)
    evaluate_every: int = Field(ge=1)
    evaluate_prompts_per_task: int = Field(ge=1)

    @property
    def longest_prompt(self) -> int:
        """Largest number of tokens of any prompt."""
        return max(self.max_prompt_length, self.swe.max_prompt_length if self.swe else 0)

    @property
    def mean_prompt_limit(self) -> float:
        """The limits of both kinds of prompts, weighted by their shares."""
        if self.swe is None:
            return self.max_prompt_length
        return (1 - self.swe.share) * self.max_prompt_length + self.swe.share * self.swe.max_prompt_length

    @model_validator(mode="after")
    def _windows(self) -> Rl:
        if sorted(set(self.windows)) != self.windows:
            raise ValueError(f"windows={self.windows} must rise")
        if len(self.windows) > 1 and self.advance is None:
            raise ValueError("several windows need the `advance` criteria")
        batch = self.prompts_per_step * self.group_size
        if batch % self.updates_per_step:
            raise ValueError(
                f"prompts_per_step x group_size = {batch} is not a multiple of updates_per_step={self.updates_per_step}"
            )
        return self


class Evaluate(Section):
    """pass@1 as the mean of k samples (report §6: temperature 1.0, top-p 0.95)."""

    samples_per_prompt: int = Field(ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(ge=1)
    prompts_per_task: int = Field(ge=1)
    #: Prompts per task for the checkpoint before SFT; all where absent. It cannot end an answer yet, and so fills the
    #: whole window with every response: the dearest checkpoint to evaluate, and the least interesting one.
    prompts_per_task_before_sft: int | None = Field(None, ge=1)
    swe: EvaluateSwe | None = None


class Export(Section):
    """Safetensors that others read, checked before they count as done."""

    layout: Literal["transformers", "minimax-m1"] = Field(
        "transformers", description="for transformers' MiniMaxForCausalLM, or as MiniMax-M1 was released (vLLM)"
    )
    head_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the LM head, which is trained in float32; bf16 rounds it, as the released checkpoint does",
    )
    shard_gigabytes: float = Field(5.0, gt=0, description="largest file of weights, in 10^9 bytes")
    check: Literal["logits", "weights"] = Field(
        "logits",
        description="weights: every tensor read back, bit for bit, one at a time; logits: also log-probabilities "
        "beside the training model, which takes both models in the memory of one process",
    )
    check_tokens: int = Field(ge=1, description="length of the sequence on which both models are compared")
    tolerance: float = Field(gt=0, description="largest allowed absolute difference of the log-probabilities")


class Checkpoints(Section):
    """How the training stages keep their checkpoints; `checkpoint_every` of a stage says when it makes one."""

    keep: int = Field(
        2, ge=1, description="newest complete checkpoints kept while a stage trains; at its end, the last"
    )
    keep_every: int | None = Field(
        None, ge=1, description="those of steps that are multiples of this are kept for good"
    )
    asynchronous: bool = Field(True, description="written beside the training, where the platform can (Linux)")
    stop_seconds: float = Field(
        15.0, ge=1, description="from SIGTERM to the end of the stage: long enough for one step and one checkpoint"
    )


class FlowSettings(Section):
    """How the flow treats a stage that fails."""

    retries: int = Field(0, ge=0, description="retries of a stage that was killed or lost its machine")
    retry_delay_seconds: int = Field(5, ge=0)


class Profile(Section):
    """A whole run. Read one with `load`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        alias_generator=AliasGenerator(alias=lambda field: field.replace("_", "-")),
        populate_by_name=False,
    )

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(ge=0)
    order: list[Literal[STAGES]]  # type: ignore[valid-type]
    flow: FlowSettings = FlowSettings()
    checkpoints: Checkpoints = Checkpoints()
    model: Model
    parallel: Parallel
    corpus: Corpus
    tokenizer: Tokenizer
    tokens: Tokens
    sft_data: SftData
    synthesize: Synthesize
    pretrain: Pretrain
    sft: Sft
    context_extension: ContextExtension
    rl_40k: Rl
    rl_80k: Rl
    evaluate: Evaluate
    export: Export

    def section(self, stage: str) -> Section:
        """The section that `stage` (for example "rl-40k") owns."""
        return getattr(self, stage.replace("-", "_"))

    def parent_of(self, stage: str) -> str | None:
        """The training stage whose checkpoint `stage` starts from, by the profile's order."""
        before = [name for name in self.order[: self.order.index(stage)] if name in TRAINING_STAGES]
        return before[-1] if before else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with the same keys as the YAML file, every default resolved."""
        return self.model_dump(mode="json", by_alias=True)

    @model_validator(mode="after")
    def _order_is_possible(self) -> Profile:
        seen: set[str] = set()
        for stage in self.order:
            if stage in seen:
                raise ValueError(f"order: {stage} appears twice")
            for needed in READS[stage]:
                if needed in self.order and needed not in seen:
                    raise ValueError(f"order: {stage} reads {needed}, which must come before it")
            continues = stage in ("sft", "context-extension", "rl-40k", "rl-80k", "evaluate", "export")
            if continues and not seen & set(TRAINING_STAGES):
                raise ValueError(f"order: {stage} needs a trained parent, put pretrain before it")
            seen.add(stage)
        missing = [needed for stage in self.order for needed in READS[stage] if needed not in seen]
        if missing:
            raise ValueError(f"order: {missing[0]} is missing, and a later stage reads it")
        if "rl-80k" in seen and "rl-40k" in seen and self.order.index("rl-80k") < self.order.index("rl-40k"):
            raise ValueError("order: rl-80k continues rl-40k and must come after it")
        return self

    @model_validator(mode="after")
    def _swe_is_possible(self) -> Profile:
        made, most = self.synthesize.swe, self.model.max_position_embeddings
        evaluate = self.evaluate
        asked: list[tuple[str, SwePrompts | None, int]] = [
            ("rl-40k", self.rl_40k.swe, self.rl_40k.windows[-1]),
            ("rl-80k", self.rl_80k.swe, self.rl_80k.windows[-1]),
            ("evaluate", evaluate.swe, (evaluate.swe and evaluate.swe.max_new_tokens) or evaluate.max_new_tokens),
        ]
        broken = []
        for name, part, window in asked:
            if part is None:
                continue
            limit = part.max_prompt_length
            if made is None:
                broken.append(f"{name}.swe: no such tasks are made; give synthesize.swe a value, or remove {name}.swe")
            elif limit < made.question_length:
                broken.append(
                    f"{name}.swe.max_prompt_length={limit} is below synthesize.swe.question_length="
                    f"{made.question_length}: hardly a question would fit; raise the one or lower the other"
                )
            if limit + window > most:
                broken.append(
                    f"{name}.swe.max_prompt_length={limit} with {window} tokens of answer exceeds "
                    f"model.max_position_embeddings={most}"
                )
        _refuse(broken)
        return self

    @model_validator(mode="after")
    def _layout_is_possible(self) -> Profile:
        _refuse([f"parallel: {rule}" for rule in layout.broken_rules(self.model, self.parallel)])
        replicas = self.parallel.data_parallel_size
        batches = [("pretrain", self.pretrain), ("sft", self.sft)]
        batches += [(f"context-extension.stages[{i}]", s) for i, s in enumerate(self.context_extension.stages)]  # type: ignore[misc]
        for name, part in batches:
            rules = layout.sequence_rules(self.parallel, part.sequence_length)
            rules += layout.batch_rules(self.parallel, part.global_batch_size, part.micro_batch_size)
            _refuse([f"{name}: {rule}" for rule in rules])
        if self.sft.text is not None:
            rules = layout.sequence_rules(self.parallel, self.sft.text.sequence_length)
            _refuse([f"sft.text: {rule}" for rule in rules])
        shared = [("context-extension.replay_samples", self.context_extension.replay_samples)]
        if self.sft.text is not None:
            shared.append(("sft.text.sequences", self.sft.text.sequences))
        for name, count in shared:
            if count % replicas:
                raise ValueError(f"{name}={count} is not a multiple of the data-parallel size {replicas}")
        for name, rl in (("rl-40k", self.rl_40k), ("rl-80k", self.rl_80k)):
            batch = rl.prompts_per_step * rl.group_size // rl.updates_per_step
            if batch % replicas or rl.prompts_per_step % replicas:
                raise ValueError(
                    f"{name}: prompts_per_step={rl.prompts_per_step} and responses per update={batch} must be "
                    f"multiples of the data-parallel size {replicas}"
                )
        if self.export.head_precision == "bf16" and self.parallel.precision == "fp32":
            raise ValueError(
                "export: head_precision=bf16 with parallel.precision=fp32 would store the LM head coarser than the rest"
            )
        longest = max(stage.sequence_length for stage in self.context_extension.stages)
        if longest > self.model.max_position_embeddings:
            raise ValueError(
                f"context-extension: sequence_length={longest} exceeds model.max_position_embeddings="
                f"{self.model.max_position_embeddings}"
            )
        return self


def available() -> list[str]:
    """Names of the profiles in `profiles/`."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def load(name_or_path: str, *, overrides: dict[str, Any] | None = None) -> Profile:
    """Read and check a profile.

    Args:
        name_or_path: a name in `profiles/`, or a path to a YAML file.
        overrides: dotted fields and their values, for example {"pretrain.train_steps": 10}.

    Raises:
        UsageError: the file is missing or not YAML, or a field is unknown, mistyped or impossible.
    """
    path = Path(name_or_path) if name_or_path.endswith((".yaml", ".yml")) else paths.PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        raise UsageError(f"profile {name_or_path!r}: no file {path}", f"Choose one of: {', '.join(available())}.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}", "Correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a mapping of sections, found {type(content).__name__}", "Correct the file.")
    for dotted, value in (overrides or {}).items():
        _set(content, dotted, value, path)
    return parse(content, str(path))


def parse(content: dict[str, Any], source: str) -> Profile:
    """Check a profile given as plain values; `source` names it in error messages."""
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {_describe(error)}") from error


def _set(content: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    *parents, last = dotted.split(".")
    for key in parents:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise UsageError(f"{path}: override {dotted}: {key} is not a section", "Use section.field=value.")
    content[last] = value


def _describe(error: ValidationError) -> str:
    """Every fault of a profile, one clause each: field, value, what is allowed."""
    clauses = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(fault["loc"][-1]), _known_fields(fault["loc"][:-1]), n=1)
            hint = f"did you mean {near[0]}?" if near else "remove it"
            clauses.append(f"{field}: unknown field (value {fault['input']!r}); {hint}")
        elif fault["type"] == "missing":
            clauses.append(f"{field}: missing; give it a value")
        elif fault["type"] == "value_error":
            message = str(fault["ctx"]["error"])
            clauses.append(f"{field}: {message}" if field else message)
        else:
            clauses.append(f"{field}: {fault['msg']} (value {fault['input']!r})")
    return "; ".join(clauses)


def _known_fields(location: tuple[int | str, ...]) -> list[str]:
    """Field names of the section at `location`, for suggestions."""
    kind: Any = Profile
    for part in location:
        fields = {(f.alias or n): f.annotation for n, f in getattr(kind, "model_fields", {}).items()}
        kind = fields.get(str(part))
    return [f.alias or n for n, f in getattr(kind, "model_fields", {}).items()]
