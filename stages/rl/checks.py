"""What a profile may ask of the RL stages."""

from __future__ import annotations

from collections.abc import Iterator

from m1.config.profile import Profile
from m1.config.rl import Rl

#: Sizes that must be 1 as long as a rank generates with a whole model of its own.
_SPLITS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)


def rules(stage: str, profile: Profile) -> Iterator[str]:
    """What is impossible, one clause each."""
    section = profile.section(stage, Rl)
    replicas = profile.parallel.data_parallel_size
    batch = section.prompts_per_step * section.group_size // section.updates_per_step
    if batch % replicas or section.prompts_per_step % replicas:
        yield (
            f"{stage}: prompts_per_step={section.prompts_per_step} and responses per update={batch} must be "
            f"multiples of the data-parallel size {replicas}"
        )
    if section.temperature != 1.0:
        yield (
            f"{stage}.temperature={section.temperature}: the importance ratio is that of the policy at temperature 1; "
            "set it to 1.0"
        )
    if section.rewards.overlong_cache >= section.windows[0]:
        yield (
            f"{stage}.rewards.overlong_cache={section.rewards.overlong_cache} is not below the first window, "
            f"{section.windows[0]} tokens; lower it, or widen the window"
        )
    cispo = section.cispo
    if cispo.is_weight_max < 1 or (cispo.is_weight_min or 0.0) > 1:
        yield (
            f"{stage}.cispo: is_weight_min={cispo.is_weight_min} and is_weight_max={cispo.is_weight_max} do not "
            "enclose 1, the ratio of an unchanged policy: they bound the ratio itself, not its distance from 1; for an "
            "upper distance of 0.2 write 1.2"
        )
    longest = section.max_prompt_length + section.windows[-1]
    if longest > profile.model.max_position_embeddings:
        yield (
            f"{stage}: max_prompt_length + last window = {longest} tokens exceeds model.max_position_embeddings="
            f"{profile.model.max_position_embeddings}; lower one of them, or raise the model's"
        )
    yield from _unreached_windows(stage, section)


def _unreached_windows(stage: str, section: Rl) -> Iterator[str]:
    """The last window must come even where every move is forced."""
    if section.advance is None:
        return
    moves = len(section.windows) - 1
    needed = moves * section.advance.max_steps + 1
    if section.train_steps < needed:
        reached = section.windows[min(moves, (section.train_steps - 1) // section.advance.max_steps)]
        yield (
            f"{stage}: with advance.max_steps={section.advance.max_steps}, {section.train_steps} steps may end in the "
            f"window of {reached} tokens and never reach {section.windows[-1]}; give it train_steps={needed} or more, "
            "lower advance.max_steps, or name fewer windows"
        )


def limits(stage: str, profile: Profile) -> Iterator[str]:
    """What this version cannot do yet, one clause each."""
    split = [f"{name}={size}" for name in _SPLITS if (size := getattr(profile.parallel, name)) != 1]
    if split:
        yield f"{stage}: parallel.{', '.join(split)}, but rollouts need the whole model on every rank; set to 1"
