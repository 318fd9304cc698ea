"""How much of each source goes into the corpus, and how long documents are cut."""

from __future__ import annotations


def quotas(weights: dict[str, float], available: dict[str, int], total: int) -> dict[str, int]:
    """Bytes to take from each source so that shares follow the weights as far as the sources reach.

    A source smaller than its share gives all it has; what is missing is spread over the others by their weights.

    Args:
        weights: source -> relative weight.
        available: source -> bytes it has after cleaning.
        total: bytes wanted in all.

    Returns:
        source -> bytes, at most `available`, together at most `total`.
    """
    taken = {name: 0 for name in weights}
    active = {name for name in weights if available[name] > 0}
    remaining = total
    while active and remaining > 0:
        unit = remaining / sum(weights[name] for name in sorted(active))
        exhausted = {name for name in active if available[name] <= unit * weights[name]}
        if not exhausted:
            for name in active:
                taken[name] = int(unit * weights[name])
            break
        for name in exhausted:
            taken[name] = available[name]
            remaining -= available[name]
        active -= exhausted
    return taken


def split_document(text: str, max_characters: int) -> list[str]:
    """Cut a text into parts of at most `max_characters`, at blank lines where there are any, else at line ends.

    The parts joined give the text again.
    """
    parts: list[str] = []
    while len(text) > max_characters:
        cut = text.rfind("\n\n", max_characters // 2, max_characters - 1)
        cut = cut + 2 if cut >= 0 else text.rfind("\n", max_characters // 2, max_characters) + 1
        cut = cut or max_characters
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]
