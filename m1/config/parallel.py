"""Parallel layout of a training stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m1.config.base import Section, refuse


class Parallel(Section):
    """Parallel layout of the training stages; the data-parallel size is what remains of the world size.

    `m1.config.layout` has the rules; a tensor-parallel layout is sequence-parallel as well.
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
        refuse(world_size_rules(self))
        return self


def world_size_rules(parallel: Parallel) -> list[str]:
    """The ranks make whole groups, for the dense layers and for the experts."""
    broken = []
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    dense = tensor * pipeline * parallel.context_parallel_size
    if parallel.world_size % dense:
        broken.append(
            f"world_size={parallel.world_size} is not a multiple of tensor x pipeline x context parallel = {dense}"
        )
    sparse = parallel.expert_tensor_parallel_size * parallel.expert_model_parallel_size * pipeline
    if parallel.world_size % sparse:
        broken.append(
            f"world_size={parallel.world_size} is not a multiple of expert-tensor x expert x pipeline parallel = "
            f"{sparse}"
        )
    return broken
