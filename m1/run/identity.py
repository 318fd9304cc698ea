"""When two executions of a stage are the same work: its fingerprint.

It covers the code that the stage can reach (its import closure, computed), the versions of the packages that this code
imports, the stage's section of the profile and what else of it decides the result, the data it reads, and the run or
base model it starts from. Where a stage runs is not part of it.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import JsonValue

from m1 import paths
from m1.config.differences import differences
from m1.config.profile import Profile
from m1.files import write_json
from m1.run import code
from m1.run.closure import closure, source_of
from m1.run.registry import stage
from m1.run.stage import Origin, Stage

#: Modules that a stage can reach and that change no result, by pattern, each with the reason.
WITHOUT_EFFECT = {
    "m1.errors": "wording of errors",
    "m1.paths": "where things are kept",
    "m1.figures": "figures",
    "m1.training.figures": "figures",
    "stages.*.figures": "figures",
    "stages.*.stage": "what a stage says of itself; what of it counts is in the fingerprint by its value",
    "m1.run": "the contract: how a stage is given its inputs and where it leaves its outputs",
    "m1.run.*": "the same",
    "m1.tracking": "looks at results",
    "m1.tracking.*": "the same",
    "m1.planning.*": "estimates, made before anything runs",
    "m1.config.profile": "puts sections together; their values count, and the modules of the sections",
    "m1.config.reading": "reads and refuses; the values count",
    "m1.config.base": "refuses; the values count",
    "m1.config.layout": "refuses layouts; the layout's values count",
    "m1.tasks.*.family": "asks a family's own modules to do the work, which count; refuses",
    "m1.tasks.families": "finds families; those a stage asks for count",
    "infra.process": "starts, finds and ends processes",
    "infra.supervise": "the same",
    "infra.tools": "finds the sandbox; its code counts where a stage uses it",
}
#: Packages that only check values.
PACKAGES_WITHOUT_EFFECT = {"pydantic"}
#: Files that modules read as data and that decide results as their code does: module -> folder of the checkout.
RESOURCES = {
    "kernels.build": "kernels/csrc",
    "m1.tasks.swe.runner": "m1/tasks/swe/inside",
    "infra.sandbox.container": "infra/sandbox/inside",
}


def modules_of(record: Stage, profile: Profile) -> tuple[list[str], list[str]]:
    """Modules whose code decides what a stage does with this profile, and the packages of others that they import."""
    modules: set[str] = set()
    packages: set[str] = set()
    for entry in (record.module, *record.plugins(profile)):
        found = closure(entry, _has_no_effect)
        modules |= found.modules
        packages |= found.packages
    return sorted(modules), sorted(packages - PACKAGES_WITHOUT_EFFECT)


def all_code_of(record: Stage) -> list[Path]:
    """Files whose code decides what a stage does, for any profile: a package of plugins stands for all in it."""
    found: set[Path] = set(files_of(closure(record.module, _has_no_effect).modules))
    for package in record.loads:
        folder = paths.ROOT.joinpath(*package.split("."))
        for file in folder.rglob("*.py"):
            name = ".".join(file.relative_to(paths.ROOT).with_suffix("").parts).removesuffix(".__init__")
            found |= set(files_of(closure(name, _has_no_effect).modules))
        found = {path for path in found if not path.is_relative_to(folder)} | {folder}
    return sorted(found)


def files_of(modules: Iterable[str]) -> list[Path]:
    """Source files of modules, with the resources that they read."""
    files: list[Path] = []
    for name in modules:
        path = source_of(name)
        assert path is not None
        files.append(path)
        if name in RESOURCES:
            folder = paths.ROOT / RESOURCES[name]
            files += [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    return sorted(set(files))


def _has_no_effect(module: str) -> bool:
    return any(fnmatch.fnmatchcase(module, pattern) for pattern in WITHOUT_EFFECT)


def code_digest(*entries: str) -> str:
    """Hash of all that these modules can reach, as it counts in a fingerprint."""
    reached = [name for entry in entries for name in closure(entry, _has_no_effect).modules]
    return code.digest(files_of(reached))


def code_identity(record: Stage, profile: Profile) -> dict[str, JsonValue]:
    """What the code of a stage is: a hash of it, and the versions of the packages it stands on."""
    modules, packages = modules_of(record, profile)
    files = [*files_of(modules), *(path for path in record.files(profile) if path.is_file())]
    return {"code": code.digest(files), "packages": dict(versions(packages))}


def versions(packages: Iterable[str]) -> Mapping[str, str]:
    """Version of every distribution behind these top-level names, and of Python."""
    owners = _distributions()
    found = {name: importlib.metadata.version(name) for package in packages for name in owners.get(package, ())}
    return {"python": ".".join(map(str, sys.version_info[:2])), **dict(sorted(found.items()))}


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def settings_of(record: Stage, profile: Profile) -> dict[str, JsonValue]:
    """The values of the profile that decide a stage's result: its section, and what its record names."""
    values = profile.to_dict()
    return {name: _value(values, name) for name in (record.name, *record.settings)}


def _value(values: Mapping[str, JsonValue], dotted: str) -> JsonValue:
    found: JsonValue = dict(values)
    for part in dotted.split("."):
        assert isinstance(found, dict)
        found = found[part]
    return found


def fingerprint(
    stage_name: str,
    profile: Profile,
    data_digests: Mapping[str, str],
    *,
    parent: str | None = None,
    history: Iterable[str] = (),
    origin: Origin | None = None,
    left_out: Iterable[str] = (),
) -> str:
    """Identity of one execution: 64 hex digits.

    Args:
        data_digests: data stage -> hash of what it made.
        parent: fingerprint of the run that it starts from.
        history: names of the run folders upstream; they count where the stage compares them.
        origin: base model it starts from; its digest counts, not its place.
        left_out: task families that it does without.
    """
    record = stage(stage_name)
    identity = {
        "stage": stage_name,
        **code_identity(record, profile),
        "settings": settings_of(record, profile),
        "data": dict(sorted(data_digests.items())),
        "parent": parent,
        "history": list(history) if record.compares_history else [],
        "origin": origin.digest if origin else None,
        "left_out": sorted(left_out),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# --- data stages ----------------------------------------------------------------------------------------------------
#
# DVC decides by the bytes of files. What a data set was made by is noted beside it as well, by the rules above: then a
# changed comment makes no data set again, and a new version of a package does.

#: Data sets that are remembered of one stage, the newest last: `dvc checkout` may bring an older one back.
_REMEMBERED = 8


def data_identity(record: Stage, profile: Profile) -> dict[str, JsonValue]:
    """What decides the output of a data stage besides the data sets it reads."""
    return {**code_identity(record, profile), "settings": settings_of(record, profile)}


def note_made(record: Stage, profile: Profile, made_by: Mapping[str, JsonValue]) -> None:
    """Note what a data set was made by, before DVC has hashed it."""
    write_json(_notes(record.name, profile.name), {**_known(record.name, profile.name), "": dict(made_by)})


def note_recorded(record: Stage, profile: Profile, digest: str) -> None:
    """The data set that was made last has this hash in dvc.lock now."""
    known = _known(record.name, profile.name)
    if (made_by := known.pop("", None)) is not None:
        known.pop(digest, None)
        known[digest] = made_by
        write_json(_notes(record.name, profile.name), dict(list(known.items())[-_REMEMBERED:]))


def made_by(record: Stage, profile: Profile, digest: str) -> Mapping[str, JsonValue] | None:
    """What the data set with this hash was made by, if that was noted here."""
    return _known(record.name, profile.name).get(digest)


def changes(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue]) -> list[str]:
    """In what two identities of a stage's code and settings differ, in plain words."""
    texts = [f"profile: {text}" for name in _names(old, new, "settings") for text in _of_settings(old, new, name)]
    packages = _names(old, new, "packages")
    texts += [f"package: {text}" for name in packages for text in _of(old, new, "packages", name)]
    return texts + (["code: changed"] if old.get("code") != new.get("code") else [])


def _names(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], part: str) -> list[str]:
    return list(dict.fromkeys([*_part(old, part), *_part(new, part)]))


def _part(identity: Mapping[str, JsonValue], part: str) -> dict[str, JsonValue]:
    found = identity.get(part)
    return found if isinstance(found, dict) else {}


def _of_settings(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], name: str) -> list[str]:
    return differences(_part(old, "settings").get(name), _part(new, "settings").get(name), name)


def _of(old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], part: str, name: str) -> list[str]:
    return differences(_part(old, part).get(name), _part(new, part).get(name), name)


def _notes(stage_name: str, profile_name: str) -> Path:
    return paths.data_dir(profile_name, ".identity") / f"{stage_name}.json"


def _known(stage_name: str, profile_name: str) -> dict[str, dict[str, JsonValue]]:
    try:
        content = json.loads(_notes(stage_name, profile_name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
