"""Whether the tokenizer of a base model is the one that the profile's data is made with. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1.errors import UsageError
from m1.rows import read_json, shown

OURS = "tokenizer.json"
#: SentencePiece's own formats: none of them can say what a byte-level BPE trained here is.
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model.v3")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens with their numbers; `merges` is None where a file does not say."""

    tokens: dict[str, int]
    merges: list[str] | None = None


def difference(folder: Path, tokenizer: Path) -> str:
    """How the tokenizer in `folder` differs from ours; empty if it does not, or if ours has not been made yet.

    Every file in which the folder says its vocabulary is looked at.

    Raises:
        UsageError: one of the files is damaged.
    """
    if not (tokenizer / OURS).is_file():
        return ""
    ours = _read(tokenizer / OURS, _fast)
    found = [(name, _read(folder / name, form)) for name, form in _FORMS.items() if (folder / name).is_file()]
    for name, theirs in found:
        extra = _added_elsewhere(folder) if name != OURS else {}
        if fault := _difference(ours, Vocabulary({**theirs.tokens, **extra}, theirs.merges), tokenizer):
            return f"its {name} {fault}"
    if found:
        return ""
    if pieces := [name for name in _SENTENCEPIECE if (folder / name).exists()]:
        return f"its vocabulary is SentencePiece's ({pieces[0]}); the data is made by the byte-level BPE of {tokenizer}"
    return (
        f"it has no {', '.join(_FORMS)}: whether its tokens are those of {tokenizer}, by which the data is made, "
        "cannot be told"
    )


def _difference(ours: Vocabulary, theirs: Vocabulary, tokenizer: Path) -> str:
    names = ours.tokens.keys() | theirs.tokens.keys()
    other = sorted(token for token in names if ours.tokens.get(token) != theirs.tokens.get(token))
    if other:
        return (
            f"gives {len(other)} tokens other numbers than {tokenizer} (such as {other[0]!r}), by which the profile's "
            "data is made"
        )
    if theirs.merges is not None and theirs.merges != ours.merges:
        return f"joins letters to tokens by other merges than {tokenizer}, by which the profile's data is made"
    return ""


def _read(file: Path, form: Callable[[Path], Vocabulary]) -> Vocabulary:
    try:
        found = form(file)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{file} is no vocabulary: {type(error).__name__}: {error}", "Fetch the file again."
        ) from error
    for token, number in found.tokens.items():
        if not isinstance(token, str) or type(number) is not int:
            raise UsageError(
                f"{file} is no vocabulary: {shown(token)} has the number {shown(number)}", "Fetch it again."
            )
    return found


def _fast(file: Path) -> Vocabulary:
    """tokenizer.json of the tokenizers library: a table, or for Unigram a list whose places are the numbers."""
    content = read_json(file)
    model = content.get("model") or {}
    listed: Any = model.get("vocab") or {}
    tokens = {entry[0]: number for number, entry in enumerate(listed)} if isinstance(listed, list) else dict(listed)
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    merges = [each if isinstance(each, str) else " ".join(each) for each in model.get("merges") or []]
    return Vocabulary({**tokens, **added}, merges)


def _table(file: Path) -> Vocabulary:
    """vocab.json, with merges.txt beside it."""
    merges = file.with_name("merges.txt")
    lines = merges.read_text(encoding="utf-8").split("\n") if merges.is_file() else None
    if lines is not None:
        lines = [
            line for number, line in enumerate(lines) if line and not (number == 0 and line.startswith("#version"))
        ]
    return Vocabulary(dict(read_json(file)), lines)


def _listed(file: Path) -> Vocabulary:
    """vocab.txt: one token a line."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return Vocabulary({token: number for number, token in enumerate(lines) if token})


_FORMS: dict[str, Callable[[Path], Vocabulary]] = {OURS: _fast, "vocab.json": _table, "vocab.txt": _listed}


def _added_elsewhere(folder: Path) -> dict[str, int]:
    """Tokens that stand beside a vocabulary of the older form: added_tokens.json, tokenizer_config.json."""
    added: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name)
            try:
                if name == "added_tokens.json":
                    added |= content
                else:
                    listed = content.get("added_tokens_decoder") or {}
                    added |= {entry["content"]: int(number) for number, entry in listed.items()}
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UsageError(f"{folder / name} is damaged: {error}", "Fetch the file again.") from error
    return added
