"""Heuristic quality filters: whether a document is kept, and if not, why.

The Gopher rules are datatrove's own filters, called document by document. Thresholds come from the corpus spec, per
domain: the published ones are for web prose and would throw away much of mathematics and code (MiniMax-M1 report §2.1
asks for high recall there).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from datatrove.data import Document as TroveDocument
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from m1.data.corpus_spec import CodeRules, Filters

#: A filter maps a text to the reason for rejecting it, or None to keep it.
Filter = Callable[[str], str | None]

_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_LETTERS, _DIGITS = re.compile(r"[^\W\d_]+"), re.compile(r"\d+")


class PatternTokenizer(WordTokenizer):
    """Words and single punctuation marks by one pattern; datatrove's default for English needs a language package."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in _WORD.finditer(text)]


WORDS = PatternTokenizer()


def build(rules: Filters) -> list[Filter]:
    """The filters of one domain, cheapest first."""
    filters: list[Filter] = [_not_empty]
    if rules.code is not None:
        filters.append(_code_filter(rules.code))
    if rules.quality is not None:
        filters.append(_trove(GopherQualityFilter(**rules.quality.model_dump(), language=WORDS)))
    if rules.repetition is not None:
        values = rules.repetition.model_dump()
        values["top_n_grams"] = tuple(values["top_n_grams"].items())
        values["dup_n_grams"] = tuple(values["dup_n_grams"].items())
        filters.append(_trove(GopherRepetitionFilter(**values, language=WORDS)))
    return filters


def rejection(text: str, filters: list[Filter]) -> str | None:
    """Reason of the first filter that rejects the text, or None."""
    return next((reason for check in filters if (reason := check(text)) is not None), None)


def _not_empty(text: str) -> str | None:
    return None if text.strip() else "empty"


def _trove(stage: GopherQualityFilter | GopherRepetitionFilter) -> Filter:
    def check(text: str) -> str | None:
        result = stage.filter(TroveDocument(text=text, id=""))
        return result[1] if isinstance(result, tuple) and not result[0] else None

    return check


def _code_filter(rules: CodeRules) -> Filter:
    def check(text: str) -> str | None:
        lines = text.splitlines()
        if len(lines) < rules.min_lines:
            return "code_too_few_lines"
        if max(map(len, lines)) > rules.max_line_length:
            return "code_long_line"
        if len(text) / len(lines) > rules.max_avg_line_length:
            return "code_long_lines"
        if _count(_LETTERS, text) / len(text) < rules.min_alpha_fraction:
            return "code_few_letters"
        if _count(_DIGITS, text) / len(text) > rules.max_digit_fraction:
            return "code_many_digits"
        return None

    return check


def _count(runs: re.Pattern[str], text: str) -> int:
    """Characters in all matches of a pattern of runs; many times faster than a test per character."""
    return sum(map(len, runs.findall(text)))
