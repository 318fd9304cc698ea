"""Faults of a file's content in words: which field, which value, what is allowed."""

from __future__ import annotations

import difflib
import re
import reprlib
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NewType, Union, get_args, get_origin

from pydantic import AliasChoices, AliasPath, BaseModel, RootModel, ValidationError
from pydantic.fields import FieldInfo

#: Characters of a value, or of a name, that a message shows.
LONGEST = 80
#: Clauses of a message; thousands would follow where every item of a long list has the same fault.
_MOST_CLAUSES = 20
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist = 3, 8, 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = LONGEST


def describe(error: ValidationError, model: type[BaseModel], content: object = None) -> str:
    """Every fault, one clause each: field, value, what is allowed. Never raises.

    Args:
        error: what validating with `model` has raised.
        model: tells the known fields, for suggestions, and which parts of a place are names of types, not of fields.
        content: what was validated; given it, items of lists that have a `name` are called by it instead of a number.
    """
    clauses = list(dict.fromkeys(_clause(fault, model, content) for fault in error.errors(include_url=False)))
    more = len(clauses) - _MOST_CLAUSES
    return "; ".join(clauses[:_MOST_CLAUSES] + ([f"and {more} more"] if more > 0 else []))


def shorten(value: object) -> str:
    """The value as Python writes it, at most `LONGEST` characters of it."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def name_of(part: object) -> str:
    """A part of a field's name: as it is, unless it would garble the line."""
    text = str(part)
    return text if text.isprintable() and len(text) <= LONGEST else shorten(text)


def _clause(fault: Any, model: type[BaseModel], content: object) -> str:
    shown, section, last = _walk(fault["loc"], model, content)
    context = fault.get("ctx", {})
    value = f"(value {shorten(fault['input'])})"
    if fault["type"] == "extra_forbidden":
        known = _known_fields(section)
        near = difflib.get_close_matches(last[:LONGEST], known, n=1)
        allowed = f"known here: {', '.join(sorted(known))}" if known else "remove it"
        message = f"unknown field; did you mean {near[0]}? {value}" if near else f"unknown field {value}; {allowed}"
    elif fault["type"] == "missing":
        message = "missing; give it a value"
    elif fault["type"] == "union_tag_not_found":
        shown.append(context["discriminator"].strip("'"))
        message = "missing; give it a value"
    elif fault["type"] == "union_tag_invalid":
        shown.append(context["discriminator"].strip("'"))
        message = f"Input should be one of {context['expected_tags']} (value {shorten(context['tag'])})"
    elif fault["type"] in ("value_error", "assertion_error"):  # one of our own validators: its words have the value
        message = str(context["error"])
    elif fault["type"] in ("model_type", "dict_type"):
        message = f"Input should be a section of fields {value}"
    else:
        message = f"{fault['msg']} {value}"
    return f"{'.'.join(shown)}: {message}" if shown else message


def _walk(location: Iterable[int | str], model: type[BaseModel], content: object) -> tuple[list[str], Any, str]:
    """Names to show for a fault's place, the type of the section that holds the last of them, and the last."""
    shown: list[str] = []
    section: Any = None
    last = ""
    kind: tuple[Any, Any] = (model, None)
    for part in location:
        members, discriminator = _members(*kind)
        if len(members) > 1:
            # pydantic says here which member of the union it has tried; nobody wrote that into the file.
            kind = (next((m for m in members if _is_named(m, str(part), discriminator)), None), None)
            continue
        section, last = members[0], str(part)
        kind = _below(section, part)
        if part == "[key]":
            continue  # the key itself is at fault, and stands before
        content = _item(content, part)
        name = content.get("name") if isinstance(part, int) and isinstance(content, dict) else None
        shown.append(name_of(name if isinstance(name, str) else part))
    return shown, section, last


def _item(content: object, part: int | str) -> object:
    if isinstance(content, dict):
        return content.get(part)
    if isinstance(content, list) and isinstance(part, int) and 0 <= part < len(content):
        return content[part]
    return None


def _members(kind: Any, discriminator: Any = None) -> tuple[list[Any], Any]:
    """The types a value may have, None left out, and what tells them apart."""
    while True:
        if get_origin(kind) is Annotated:
            kind, *marks = get_args(kind)
            discriminator = next((m.discriminator for m in marks if hasattr(m, "discriminator")), discriminator)
        elif get_origin(kind) in (Union, types.UnionType):
            members = [member for member in get_args(kind) if member is not types.NoneType]
            if len(members) > 1:
                return members, discriminator
            kind = members[0]
        elif isinstance(kind, NewType):
            kind = kind.__supertype__
        elif hasattr(kind, "__value__"):  # a `type` statement
            kind = kind.__value__
        elif isinstance(kind, type) and issubclass(kind, RootModel):
            kind = kind.model_fields["root"].annotation
        else:
            return [kind], discriminator


def _is_named(member: Any, label: str, discriminator: Any) -> bool:
    """Whether pydantic's name for the member of a union that it has tried means this one."""
    if get_origin(member) is Annotated and any(getattr(mark, "tag", None) == label for mark in get_args(member)):
        return True
    for kind in _members(member)[0]:
        model = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
        if model is None:
            found = label.startswith(f"{getattr(get_origin(kind) or kind, '__name__', kind)}[")
        elif isinstance(discriminator, str) and discriminator in model.model_fields:
            found = label in map(str, get_args(model.model_fields[discriminator].annotation))
        else:  # `Name`, or `function-after[check(), Name]` for a model with validators
            found = re.search(rf"(^|\W){re.escape(model.__name__)}\]*$", label) is not None
        if found:
            return True
    return False


def _below(kind: Any, part: int | str) -> tuple[Any, Any]:
    """Type of what is called `part` in a value of this type, with its discriminator; None if it is not known."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            if part in _names(name, field, kind):
                return field.annotation, field.discriminator
    elif not isinstance(origin, type) or not arguments:
        pass
    elif issubclass(origin, Mapping):
        return arguments[0 if part == "[key]" else 1], None
    elif issubclass(origin, tuple) and arguments[-1] is not Ellipsis:
        return (arguments[part] if isinstance(part, int) and part < len(arguments) else None), None
    elif issubclass(origin, Iterable):
        return arguments[0], None
    return None, None


def _known_fields(section: Any) -> list[str]:
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return []
    return [known for name, field in section.model_fields.items() for known in _names(name, field, section)]


def _names(name: str, field: FieldInfo, model: type[BaseModel]) -> list[str]:
    """What a field is called in a file."""
    alias = field.validation_alias or field.alias or name
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    names = [str(choice.path[0]) if isinstance(choice, AliasPath) else choice for choice in choices]
    by_name = model.model_config.get("populate_by_name") or model.model_config.get("validate_by_name")
    return list(dict.fromkeys([*names, *([name] if by_name else [])]))
