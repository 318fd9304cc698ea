"""How long MLflow lets its texts be. What is longer is cut, with a mark that says so, and never refused."""

from __future__ import annotations

#: Characters of a run's tag; its description is one.
TAG_LENGTH = 8000
#: Of an experiment's tag. This version takes more, databases of earlier ones do not.
EXPERIMENT_TAG_LENGTH = 5000
#: Of the description of a registered model or of one version.
MODEL_DESCRIPTION_LENGTH = 5000
PARAMETER_LENGTH = 6000
KEY_LENGTH = 250


def cut(text: str, length: int) -> str:
    """`text` in at most `length` characters; the end of what was cut says how much is missing."""
    if len(text) <= length:
        return text
    kept = length - len(_mark(len(text)))
    return text[:kept] + _mark(len(text) - kept)


def _mark(missing: int) -> str:
    return f" [cut: {missing:,} more characters]"


def cut_note(text: str, length: int, whole: str = "") -> str:
    """A description in Markdown, cut at the end of a line.

    Args:
        whole: where all of it is, if anywhere.
    """
    if len(text) <= length:
        return text
    mark = f"\n\n**Cut here:** MLflow takes {length:,} of {len(text):,} characters"
    mark += f"; all of it is in {whole}." if whole else "."
    kept = text[: length - len(mark)]
    return kept[: max(kept.rfind("\n"), 0)].rstrip() + mark
