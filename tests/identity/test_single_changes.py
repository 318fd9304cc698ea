"""One change at a time, drawn by seed: exactly the stages that must rerun do.

What must rerun is worked out here by other means than the product's: imports by grimp's graph, and a table by hand of
which stage reads which part of a profile.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib.metadata
import json
import random
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml
from world import ASKING, PLAIN, World

from m1.config.profile import Profile
from m1.run import identity
from m1.run.registry import parent_of, stage

TRAINED = {"pretrain", "sft", "context-extension", "rl-40k", "rl-80k", "evaluate"}
#: Who reads which part of a profile besides the stage that owns it: written by hand, from what the stages do.
READERS: dict[str, set[str]] = {
    "seed": {"corpus", "sft-data", "synthesize", *TRAINED},
    "model": {"export", *TRAINED},
    "model.vocab_size": {"tokenizer"},
    "parallel": TRAINED,
    "parallel.precision": {"export"},
    "checkpoints": set(),
    "flow": set(),
}
#: Families' code by the stages that use it, beside what a stage imports by itself.
_TASKS = [f"m1.tasks.logic.tasks.{name}" for name in ("arithmetic", "dyck_language")]
_MADE, _JUDGED = ["m1.tasks.logic.making", *_TASKS], ["m1.tasks.logic.judging", *_TASKS]
_SWE_MADE, _SWE_JUDGED = ["m1.tasks.swe.making", "infra.sandbox"], ["m1.tasks.swe.judging", "infra.sandbox"]
LOADED: dict[str, dict[str, list[str]]] = {
    PLAIN: {"sft-data": _MADE, "synthesize": _MADE, "rl-40k": _JUDGED, "rl-80k": _JUDGED, "evaluate": _JUDGED},
    ASKING: {
        "sft-data": _MADE,
        "synthesize": _MADE + _SWE_MADE,
        "rl-40k": _JUDGED + _SWE_JUDGED,
        "rl-80k": _JUDGED,
        "evaluate": _JUDGED + _SWE_JUDGED,
    },
}


@functools.cache
def graph() -> grimp.ImportGraph:
    """Imports of the project, without the modules that change no result."""
    made = grimp.build_graph(
        "m1", "stages", "infra", "flows", "kernels", include_external_packages=True,
        exclude_type_checking_imports=True, cache_dir=None,
    )  # fmt: skip
    for module in list(made.modules):
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in identity.WITHOUT_EFFECT):
            made.remove_module(module)
    return made


def reached(profile: str, name: str) -> set[str]:
    """Modules and outer packages that a stage's work can import, by grimp."""
    entries = [stage(name).module, *LOADED[profile].get(name, [])]
    found = set(entries)
    for entry in entries:
        found |= graph().find_upstream_modules(entry)
    # Importing a module runs the packages around it.
    return found | {".".join(module.split(".")[:n]) for module in found for n in range(1, module.count(".") + 1)}


def with_those_below(profile: Profile, changed: Iterable[str]) -> set[str]:
    """Stages that rerun when these do: those that read their data, and those that start from them."""
    rerun = set(changed)
    for name in profile.order:
        parent = None if stage(name).makes_data else parent_of(profile, name)
        if rerun & set(stage(name).reads_of(profile)) or parent in rerun:
            rerun.add(name)
    return rerun


def modules() -> list[str]:
    """What can be changed; what runs inside a sandbox is a resource of another module, see below."""
    ours = (module for module in graph().modules if module.partition(".")[0] in ("m1", "stages", "infra", "kernels"))
    return sorted(module for module in ours if "inside" not in module.split("."))


def source(world: World, module: str) -> Path:
    base = world.root.joinpath(*module.split("."))
    return base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"


@pytest.fixture
def restored(world: World) -> Iterable[World]:
    """Whatever a test changes in the copy is as it was afterwards."""
    kept: dict[Path, bytes] = {}
    original = Path.write_bytes

    def write(self: Path, content: bytes) -> int:
        kept.setdefault(self, self.read_bytes())
        return original(self, content)

    world.write = write  # type: ignore[attr-defined]
    yield world
    for path, content in kept.items():
        path.write_bytes(content)


def change(world: World, path: Path, edit: Callable[[str], str]) -> None:
    before = path.read_text(encoding="utf-8")
    after = edit(before)
    assert after != before, path
    world.write(path, after.encode())  # type: ignore[attr-defined]


def check(world: World, profile: str, direct: Iterable[str]) -> None:
    settings = world.profile(profile)
    assert world.to_run(profile) == with_those_below(settings, direct)


def test_nothing_runs_where_nothing_has_changed(world: World) -> None:
    assert world.to_run(PLAIN) == set() and world.to_run(ASKING) == set()


@pytest.mark.parametrize("seed", range(22))
def test_a_line_of_code(restored: World, seed: int) -> None:
    module = random.Random(f"code/{seed}").choice(modules())
    profile = (PLAIN, ASKING)[seed % 2]
    change(restored, source(restored, module), lambda text: f"{text}\n_ADDED = {seed}\n")
    check(restored, profile, {name for name in restored.profile(profile).order if module in reached(profile, name)})


@pytest.mark.parametrize(
    ("file", "direct"),
    [
        ("kernels/csrc/lightning_cpu.cpp", {"export", *TRAINED}),
        ("m1/tasks/swe/inside/m1_probe.py", {"synthesize"}),
        ("infra/sandbox/inside/tests.py", {"synthesize", "rl-40k", "evaluate"}),
        ("m1/tasks/logic/tasks/web_of_lies.py", set()),
        ("m1/tasks/logic/tasks/arithmetic.py", {"sft-data", "synthesize", "rl-40k", "rl-80k", "evaluate"}),
        ("m1/config/training.py", {"pretrain", "sft", "context-extension", "rl-40k", "rl-80k"}),
        ("m1/config/model.py", {"export", *TRAINED}),
        ("m1/tokenizer.py", {"tokenizer", "tokens", "synthesize", "evaluate", *TRAINED} - {"pretrain"}),
        ("m1/data/fetch.py", {"corpus", "synthesize", "rl-40k", "evaluate"}),
        ("infra/sandbox/images.py", {"synthesize", "rl-40k", "evaluate"}),
    ],
)  # fmt: skip
def test_files_whose_readers_are_known(restored: World, file: str, direct: set[str]) -> None:
    """By hand, for files that an import graph says nothing of or where a list once had a gap."""
    added = "\nint added_by_the_test = 1;\n" if file.endswith(".cpp") else "\n_ADDED = 1\n"
    change(restored, restored.path(file), lambda text: text + added)
    check(restored, ASKING, direct)


_RAISE = re.compile(r'raise \w+\(\s*f?"([^"\\]{12,})"')


@pytest.mark.parametrize("seed", range(10))
def test_words_change_nothing(restored: World, seed: int) -> None:
    """Comments, docstrings, blank lines, messages of errors."""
    rng = random.Random(f"words/{seed}")
    candidates = [source(restored, module) for module in modules()]
    path = rng.choice([path for path in candidates if _RAISE.search(path.read_text())])

    def edit(text: str) -> str:
        said = rng.choice(_RAISE.findall(text))
        text = text.replace(f'"{said}"', f'"{said} in other words"', 1)
        return f"# A remark.\n{text.replace(chr(10) * 2, chr(10) * 3, 1)}\n\n# Another."

    change(restored, path, edit)
    check(restored, PLAIN, set())
    check(restored, ASKING, set())


def test_a_comment_in_a_kernel_changes_nothing(restored: World) -> None:
    change(restored, restored.path("kernels/csrc/lightning_cpu.cpp"), lambda text: f"// A remark.\n{text}")
    check(restored, PLAIN, set())


def leaves(content: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and value is not True and value is not False:
            found.append((f"{prefix}{key}", value))
    return found


def put(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        content = content[part]
    content[last] = value


def accepted(world: World, rng: random.Random) -> str:
    """Write a profile with one leaf changed to another value that is accepted; the leaf's name."""
    from m1.errors import UsageError

    path = world.path("profiles/smoke.yaml")
    before = path.read_text()
    choices = leaves(yaml.safe_load(before))
    while True:
        name, value = rng.choice(choices)
        for other in (value + 1, value * 2, value / 2 if isinstance(value, float) else value - 1):
            content = json.loads(json.dumps(yaml.safe_load(before)))  # aliases share an object otherwise
            put(content, name, other)
            world.write(path, yaml.safe_dump(content, sort_keys=False).encode())  # type: ignore[attr-defined]
            try:
                world.profile(PLAIN)
            except UsageError:
                continue
            return name


@pytest.mark.parametrize("seed", range(16))
def test_a_leaf_of_the_profile(restored: World, seed: int) -> None:
    name = accepted(restored, random.Random(f"leaf/{seed}"))
    section = name.partition(".")[0]
    direct = READERS.get(section, {section}) | READERS.get(name, set())
    check(restored, PLAIN, direct)


@pytest.mark.parametrize("name", ["corpus", "tokenizer", "tokens", "sft-data", "synthesize"])
def test_a_byte_of_a_shard(restored: World, name: str) -> None:
    path = restored.path(f"data/{PLAIN}/{name}/shard.bin")
    restored.write(path, b"X" + path.read_bytes()[1:])  # type: ignore[attr-defined]
    check(restored, PLAIN, {name})


#: Distribution -> the name it is imported by.
PACKAGES = {
    "torch": "torch", "numpy": "numpy", "megatron-core": "megatron", "datatrove": "datatrove", "mlflow": "mlflow",
    "tokenizers": "tokenizers", "safetensors": "safetensors", "transformers": "transformers", "docker": "docker",
    "matplotlib": "matplotlib", "prefect": "prefect", "pydantic": "pydantic", "typer": "typer", "datasets": "datasets",
}  # fmt: skip


@pytest.mark.parametrize("distribution", PACKAGES)
@pytest.mark.parametrize("profile", [PLAIN, ASKING])
def test_another_version_of_a_package(
    world: World, monkeypatch: pytest.MonkeyPatch, distribution: str, profile: str
) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0" if name == distribution else version(name))
    imported = PACKAGES[distribution]
    direct = {name for name in world.profile(profile).order if imported in reached(profile, name)}
    if imported in identity.PACKAGES_WITHOUT_EFFECT:
        direct = set()
    check(world, profile, direct)


def test_another_image_for_the_tests_of_tasks(restored: World) -> None:
    """What the sandbox's image is made of is in the spec: other requirements, another image."""
    change(restored, restored.path("data_specs/swe.yaml"), lambda text: text.replace("pytest==", "pytest==9", 1))
    check(restored, ASKING, {"synthesize"})
    check(restored, PLAIN, set())


def test_a_remark_in_a_spec_changes_nothing(restored: World) -> None:
    for name in ("data_specs/swe.yaml", "data_specs/corpus-tiny.yaml"):
        change(restored, restored.path(name), lambda text: f"# A remark.\n{text}")
    check(restored, ASKING, set())


def test_no_module_reads_files_beside_it_unknown_to_the_identity(world: World) -> None:
    """A module that looks beside itself (`__file__`) reads what an import graph cannot see."""
    harmless = {
        "m1.tasks.logic", "infra.launch.local", "kernels.bench", "m1.training.bench", "infra.sandbox.images",
        "m1.tasks.confined", "infra.sandbox.attacks.forgeries", "infra.sandbox.attacks.written",
    }  # fmt: skip
    found = {module for module in modules() if "__file__" in source(world, module).read_text()}
    found |= {module for module in identity.WITHOUT_EFFECT if "*" not in module} & found
    assert found - harmless <= set(identity.RESOURCES), found
    assert all((world.root / folder).is_dir() for folder in identity.RESOURCES.values())
    assert sys.version_info[:2] >= (3, 11)
