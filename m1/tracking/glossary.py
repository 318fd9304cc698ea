"""What every metric in MLflow means: one sentence with its unit for each name or pattern of names.

MLflow keeps no descriptions of metrics. They are shown as the artifact `metrics.md` of every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Pattern -> sentence. `<part>` stands for one part between slashes, or the rest of one; `{part}` repeats it.
METRICS: Mapping[str, str] = {
    # --- of a flow run
    "total_seconds": "Seconds from the start of the flow run to its end.",
    "stage_seconds": "Seconds of the flow run that its stages took, the start of their processes included.",
    "orchestration_share": "Share of the flow run's time, 0 to 1, that was spent outside its stages.",
    "stages_run": "Number of stages that did their work in this flow run.",
    "stages_skipped": "Number of stages whose work was found done and unchanged.",
    "stages_failed": "Number of stages that failed or were stopped.",
    "seconds/<stage>": "Seconds that the stage {stage} took in this flow run; none where it was skipped.",
    "key/<stage>/before": "Key metric of the stage {stage} before it: the table of the description names it.",
    "key/<stage>/after": "Key metric of the stage {stage} after it: the table of the description names it.",
    "result/pass@1/<stage>": "Share of held-out tasks, 0 to 1, that the checkpoint of {stage} solves with one answer.",
    "result/<family>/pass@1/<stage>": (
        "Share of held-out tasks of the family {family}, 0 to 1, that the checkpoint of {stage} solves with one answer."
    ),
    # --- of every stage
    "seconds": "Seconds of wall time: inside the stage's process without its imports; of a data set all of it.",
    "key/before": "The key metric before the stage: the description names it.",
    "key/after": "The key metric after the stage: the description names it.",
    # --- supervised training
    "train/loss": "Cross-entropy of the training tokens of one step, weighted as they are trained on, nats per token.",
    "train/grad_norm": "Global norm of the gradient of one step before clipping.",
    "train/learning_rate": "Learning rate of the step.",
    "train/tokens_per_second": "Tokens trained on per second since the process began, all ranks together.",
    "train/tokens_seen": "Tokens that the model has read in this stage so far, padding left out.",
    "train/tokens": "Tokens that the stage trained on in all.",
    "train/samples": "Question-answer pairs that the stage trained on in all, each epoch counted.",
    "train/sequence_length": "Tokens of a sequence in the present part of the stage.",
    "train/moe_aux_loss": "Load-balancing loss of the experts, mean over the layers, without its coefficient.",
    "train/moe_load/<expert>": "Share of all routing choices, 0 to 1, that went to expert {expert}, over all layers.",
    "train/moe_load_max": "Load of the busiest expert of any layer, in even shares: 1 is perfect balance.",
    "train/moe_dropped_tokens": "Number of routing choices of the step beyond an expert's capacity, over all layers.",
    "heldout/loss": "Cross-entropy on held-out data that is never trained on, nats per token.",
    "heldout/perplexity": "Exponential of the held-out loss: between how many tokens the model hesitates.",
    "heldout/loss_<length>": "Cross-entropy on held-out text in sequences of {length} tokens, nats per token.",
    "retrieval/<length>": (
        "Share of questions, 0 to 1, about a fact hidden in {length} tokens of text that are answered without an error."
    ),
    "retrieval/<length>_before": "The same share at {length} tokens before the context was extended, 0 to 1.",
    "layers/grad_norm_<layer>": "Norm of the gradient of layer {layer} of one step, after clipping.",
    # --- reinforcement learning
    "rl/reward": "Mean reward of the responses of one step: correctness, form and length together.",
    "rl/correct": "Share of the responses of one step that are correct, 0 to 1.",
    "rl/format": "Share of the responses of one step that think inside the tags and then answer, 0 to 1.",
    "rl/overlong_penalty": "Mean penalty for responses near or beyond the window, a part of the reward; zero or below.",
    "rl/response_length": "Mean length of a response of one step, tokens.",
    "rl/response_length_p99": "Length that 99% of the responses of one step do not exceed, tokens.",
    "rl/window": "Limit of a response's length in this step, tokens.",
    "rl/truncated": "Share of the responses that ended at the window, 0 to 1.",
    "rl/repetition_stopped": "Share of the responses that were stopped because they repeated themselves, 0 to 1.",
    "rl/entropy": "Mean of -log p of the sampled tokens, under the policy that sampled them, nats per token.",
    "rl/perplexity": "Exponential of that entropy.",
    "rl/groups_dropped": "Number of prompts not trained on: all their responses had one reward, or the batch was full.",
    "rl/groups_all_correct": "Share of the prompts of one step of which every response is correct, 0 to 1.",
    "rl/groups_none_correct": "Share of the prompts of one step of which no response is correct, 0 to 1.",
    "rl/generation_rounds": "Rounds of rollouts that it took to fill the batch of one step.",
    "rl/generated_tokens": "Tokens generated in one step, dropped groups included.",
    "rl/tokens": "Tokens generated in one step and those of the prompts read for them.",
    "rl/trained_tokens": "Response tokens that the updates of one step were computed on.",
    "rl/updates": "Optimizer steps made from the rollouts of one step.",
    "rl/loss": "Policy loss, mean over the updates of one step; its sign and size say little by themselves.",
    "rl/grad_norm": "Global norm of the gradient before clipping, mean over the updates of one step.",
    "rl/grad_norm_max": "The largest global norm of the gradient of any update of one step.",
    "rl/learning_rate": "Learning rate of the step.",
    "cispo/is_weight_mean": "Mean importance weight of the tokens after clipping; 1 where nothing has drifted.",
    "cispo/is_weight_p99": "Importance ratio that 99% of a micro-batch's tokens do not exceed, mean of these.",
    "cispo/is_weight_max": "The largest importance ratio of any token of the step, before clipping.",
    "cispo/clip_frac_high": "Share of the tokens whose importance ratio was clipped at the upper bound, 0 to 1.",
    "cispo/clip_frac_low": "Share of the tokens whose importance ratio was clipped at the lower bound, 0 to 1.",
    "cispo/clip_mass_positive": "Weight that clipping took from tokens of positive advantage, mean over all tokens.",
    "cispo/clip_mass_negative": "Weight that clipping took from tokens of negative advantage, mean over all tokens.",
    "policy/entropy_proxy": "Mean of -log p of the trained tokens, under the policy being trained, nats per token.",
    "policy/approx_kl": "Estimate of the divergence from the policy that sampled the tokens, nats per token.",
    "agreement/mean_abs_difference": "Mean absolute difference of a token's probability between the two engines.",
    "agreement/max_abs_difference": "The largest absolute difference of a token's probability between the two engines.",
    "agreement/pearson": "Correlation of the tokens' probabilities in rollout and training engine: 1 is perfect.",
    "moe_aux_loss": "Load-balancing loss of the experts, mean over the layers, without its coefficient.",
    "moe_load/<expert>": "Share of all routing choices, 0 to 1, that went to expert {expert}, over all layers.",
    "moe_load_max": "Load of the busiest expert of any layer, in even shares: 1 is perfect balance.",
    "moe_dropped_tokens": "Number of routing choices of the step beyond an expert's capacity, over all layers.",
    "time/rollout_seconds": "Seconds of one step spent on generating and judging responses.",
    "time/update_seconds": "Seconds of one step spent on training with them.",
    "time/rollout_tokens_per_second": "Tokens generated per second, all ranks together.",
    "time/update_tokens_per_second": "Response tokens trained on per second, all ranks together.",
    "heldout/pass@1/mean": "Share of held-out tasks solved with one answer, 0 to 1, mean over the kinds of task.",
    "heldout/pass@1/<task>": "Share of held-out tasks of the kind {task} solved with one answer, 0 to 1.",
    "<family>/responses": "Number of responses of one step to tasks of the family {family}.",
    "<family>/unjudged": "Number of them that could not be judged and were left out.",
    "<family>/resolved": "Share of the judged responses of one step that solve their {family} task, 0 to 1.",
    "<family>/resolved/<task>": "The same share of the tasks of the kind {task} alone, 0 to 1.",
    "<family>/end/<end>": "Number of responses of one step to tasks of the family {family} that ended as {end}.",
    # --- evaluation
    "evaluate/tokens": "Tokens generated for one checkpoint and those of the prompts read for them.",
    "pass@1/<stage>/mean": (
        "Share of held-out tasks solved by the checkpoint of {stage}, 0 to 1, mean over the kinds of task."
    ),
    "pass@1/<stage>/<task>": "Share of held-out tasks of the kind {task} solved by the checkpoint of {stage}, 0 to 1.",
    "pass@1_error/<stage>": "Standard error of the mean pass@1 of the checkpoint of {stage}.",
    "response_length/<stage>": "Mean length of an answer of the checkpoint of {stage}, tokens.",
    "<family>/pass@1/<stage>/mean": (
        "Share of held-out tasks of the family {family} solved by the checkpoint of {stage}, 0 to 1, mean over "
        "the kinds of task."
    ),
    "<family>/pass@1/<stage>/<task>": (
        "Share of held-out tasks of the family {family}, kind {task}, solved by the checkpoint of {stage}, 0 to 1."
    ),
    "<family>/pass@1_error/<stage>": "Standard error of that mean for the checkpoint of {stage}.",
    "<family>/response_length/<stage>": "Mean length of an answer of {stage} to tasks of the family {family}, tokens.",
    "<family>/unjudged/<stage>": "Number of answers of {stage} to tasks of the family {family} that were not judged.",
    # --- export
    "export/parameters": "Number of parameters of the model.",
    "export/active_parameters": "Number of parameters that one token meets on its way.",
    "export/bytes": "Size of the weights that were written, bytes.",
    "export/weights_read_back": "Number of parameters that were read back and are those of the training model.",
    "export/tokens": "Tokens of held-out text on which exported and training model were compared.",
    "export/prefill": "The largest difference of any log-probability, the text read at once, nats.",
    "export/decode": "The largest difference of any log-probability, the text read token by token, nats.",
    "export/greedy": "The most by which the training model prefers another token in a greedy answer, nats; 0 is never.",
    # --- data sets
    "data/documents": "Number of documents of the corpus.",
    "data/bytes": "Size of the corpus's text, bytes.",
    "data/domain_shares/<domain>": "Share of the corpus's bytes, 0 to 1, that belongs to the domain {domain}.",
    "data/rejected/<reason>": "Number of documents left out for the reason {reason}.",
    "data/vocab_size": "Number of tokens of the vocabulary.",
    "data/trained_on/documents": "Number of documents that the vocabulary was trained on.",
    "data/trained_on/bytes": "Size of the text that the vocabulary was trained on, bytes.",
    "data/sample/bytes": "Size of the text on which compression was measured, bytes.",
    "data/sample/tokens": "Tokens of that text.",
    "data/sample/bytes_per_token": "Bytes of text for one token.",
    "data/<split>/documents": "Number of documents of the part {split}.",
    "data/<split>/tokens": "Number of tokens of the part {split}.",
    "data/<split>/tokens_per_domain/<domain>": "Tokens of the part {split} that belong to the domain {domain}.",
    "data/<split>/rows": "Number of tasks of the part {split}.",
    "data/<split>/direct": "Number of worked answers of the part {split} without any thinking before them.",
    "data/<split>/by_task_and_difficulty/<task>/<level>": "Tasks of the part {split}: kind {task}, difficulty {level}.",
    "data/sft_ids": "Number of tasks of the fine-tuning data, which are kept out of these.",
    "data/<family>/<split>/rows": "Number of tasks of the family {family} in the part {split}.",
    "data/<family>/<split>/valid": "Number of tasks of the family {family} that passed every check, over all parts.",
}

#: First part of a name -> what metrics of that kind tell, for the short account in a run's description.
GROUPS: Mapping[str, str] = {
    "key": "the stage's key metric before and after it",
    "train": "every logged step of the training",
    "heldout": "measured on data that is never trained on",
    "retrieval": "finding a fact in a long text, by its length",
    "layers": "every layer by itself",
    "rl": "rollouts and updates of every step of reinforcement learning",
    "cispo": "importance weights of the CISPO objective",
    "policy": "how far an update moves the policy",
    "agreement": "how well rollout and training engine agree on the same tokens",
    "moe_load": "how evenly the experts are used",
    "time": "seconds and tokens per second of every step",
    "pass@1": "held-out tasks solved, by checkpoint and kind of task",
    "response_length": "length of the answers, by checkpoint",
    "evaluate": "work of the evaluation",
    "export": "the exported model against the training model",
    "data": "the data set that was made",
    "seconds": "time by stage",
    "result": "held-out tasks solved by the checkpoint of every stage",
    "final": "the values in result.json, at the last step",
}

_FINAL = "final/"


@dataclass(frozen=True)
class _Pattern:
    """A line of `METRICS`, ready to be matched."""

    shape: re.Pattern[str]
    sentence: str


def _compiled(pattern: str, sentence: str) -> _Pattern:
    parts = re.split(r"<(\w+)>", pattern)
    shape = "".join(f"(?P<{part}>[^/]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    return _Pattern(re.compile(shape), sentence)


#: Names without placeholders first, then the longer pattern: the most special description counts.
_PATTERNS = [
    _compiled(pattern, METRICS[pattern])
    for pattern in sorted(METRICS, key=lambda pattern: (pattern.count("<"), -len(pattern)))
]


def describe(name: str) -> str | None:
    """What a metric means, by its name as the stage logs it or as MLflow has it; None for an unknown name."""
    if name.startswith(_FINAL):
        meaning = describe(name.removeprefix(_FINAL))
        return f"Final value. {meaning}" if meaning else None
    raw = name.replace("_at_", "@")
    for pattern in _PATTERNS:
        if found := pattern.shape.fullmatch(raw):
            return pattern.sentence.format_map(found.groupdict())
    return None


def groups(names: Iterable[str]) -> dict[str, str]:
    """The groups that these metrics fall into, each with what it tells, in the order of `GROUPS`."""
    present = {name.replace("_at_", "@").partition("/")[0] for name in names if "/" in name}
    return {group: text for group, text in GROUPS.items() if group in present}


def table(values: Mapping[str, float], left_out: Mapping[str, float]) -> str:
    """All metrics of a run as a page in Markdown.

    Args:
        values: name in MLflow -> last value.
        left_out: what only the run's files have.
    """
    lines = ["# What the metrics of this run mean", "", *_rows(values)]
    if left_out:
        lines += ["", "## Only in result.json", "", "MLflow's pages slow down with more names than the above."]
        lines += ["", *_rows(left_out)]
    return "\n".join(lines) + "\n"


def _rows(values: Mapping[str, float]) -> list[str]:
    rows = [f"| `{name}` | {values[name]:.6g} | {describe(name) or 'no description'} |" for name in sorted(values)]
    return ["| metric | last value | meaning |", "|:---|---:|:---|", *rows]
