"""What a profile may ask of the RL stages, checked before any work."""

from __future__ import annotations

from m1.errors import UsageError
from m1.profile import Profile, Rl


def check(stage: str, settings: Profile) -> None:
    """Refuse what cannot work.

    Raises:
        UsageError: names the field.
    """
    section: Rl = settings.section(stage)  # type: ignore[assignment]
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
    ):
        size = getattr(settings.parallel, name)
        if size != 1:
            raise UsageError(
                f"{stage}: parallel.{name}={size}, but rollouts need the whole model on every rank",
                "Set it to 1.",
            )
    if section.temperature != 1.0:
        raise UsageError(
            f"{stage}.temperature={section.temperature}: the importance ratio is that of the policy at temperature 1",
            "Set it to 1.0.",
        )
    if section.rewards.overlong_cache >= section.windows[0]:
        raise UsageError(
            f"{stage}.rewards.overlong_cache={section.rewards.overlong_cache} is not below the first window, "
            f"{section.windows[0]} tokens",
            "Lower it, or widen the window.",
        )
    cispo = section.cispo
    if cispo.is_weight_max < 1 or (cispo.is_weight_min or 0.0) > 1:
        raise UsageError(
            f"{stage}.cispo: is_weight_min={cispo.is_weight_min} and is_weight_max={cispo.is_weight_max} do not "
            "enclose 1, the ratio of an unchanged policy: they bound the ratio itself, not its distance from 1",
            "For an upper distance of 0.2 write 1.2.",
        )
    longest = section.max_prompt_length + section.windows[-1]
    if longest > settings.model.max_position_embeddings:
        raise UsageError(
            f"{stage}: max_prompt_length + last window = {longest} tokens exceeds model.max_position_embeddings="
            f"{settings.model.max_position_embeddings}",
            "Lower one of them, or raise the model's.",
        )
