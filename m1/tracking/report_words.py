"""Sentences of the report, and numbers and times as it shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from m1.run.stage import Kind
from m1.tracking.report_page import Value

GLOSSARY = {
    "loss": "Mean negative log-likelihood of the next token, in nats. Lower is better; a uniform guess over the "
    "vocabulary has the logarithm of its size.",
    "perplexity": "The exponential of the loss: among how many equally likely tokens the model hesitates.",
    "held out": "Text or questions that training never sees.",
    "gradient norm": "Length of the gradient over all parameters. A sudden rise announces a run that diverges.",
    "reward": "What the verifier gives an answer: right or wrong, its format, and a penalty for overlong ones.",
    "rollout": "A response that the model samples while it is trained by reinforcement learning.",
    "pass@1": "Probability that one sampled answer is right, estimated as the mean over several samples.",
    "CISPO": "The objective of the MiniMax-M1 report §3.1: importance weights are clipped, tokens are never dropped.",
    "fingerprint": "Hash of code, settings, data and parent. The same fingerprint means the work need not be redone.",
}
#: Sorts of work, in the order of the legend; each has a colour of its own in report.css.
KINDS = tuple(kind.value for kind in Kind)


def duration(seconds: float) -> str:
    """Seconds as people read them: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> Value | None:
    """A measured number with four significant digits."""
    return numbers([value])[0]


def numbers(values: Sequence[float | None]) -> list[Value | None]:
    """Numbers that are compared, all with as many decimals as the largest of them has with four digits."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    largest = max((abs(value) for value in finite), default=0.0)
    places = 0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 10 else 3 if largest >= 1 else 4
    if all(value == round(value) for value in finite):
        places = 0
    return [None if value is None else Value(_shown(value, largest, places), value) for value in values]


def _shown(value: float, largest: float, places: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return _short(f"{value:.3e}") if largest < 1e-3 else f"{value:,.{places}f}"


def decimals(value: float | None, places: int) -> Value | None:
    """With as many decimals as its neighbours in a table."""
    return None if value is None else Value(f"{value:.{places}f}", value)


def count(value: float | None) -> Value | None:
    """A whole number with separators."""
    return None if value is None else Value(f"{value:,.0f}", value)


def power(value: float | None) -> Value | None:
    """A very large number: "1.50e12"."""
    return None if value is None else Value(_short(f"{value:.2e}"), value)


def share(value: float | None, of: float | None) -> Value | None:
    """Per cent."""
    return Value(f"{value / of:.0%}", value / of) if value is not None and of else None


def _short(text: str) -> str:
    """Without the zeros and the plus of the exponent."""
    digits, _, exponent = text.partition("e")
    return f"{digits}e{int(exponent)}"


__all__ = [
    "GLOSSARY",
    "KINDS",
    "count",
    "decimals",
    "duration",
    "number",
    "numbers",
    "power",
    "share",
]
