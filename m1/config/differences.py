"""In which fields two settings differ."""

from __future__ import annotations

import json


def differences(old: object, new: object, name: str) -> list[str]:
    """Every field in which two nested settings differ, as "section.field old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [text for key in keys for text in differences(old.get(key), new.get(key), f"{name}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [text for i, pair in enumerate(zip(old, new)) for text in differences(*pair, f"{name}[{i}]")]
    return [] if old == new else [f"{name} {_short(old)} -> {_short(new)}"]


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
