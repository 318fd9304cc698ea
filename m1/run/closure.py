"""Which modules of this project a module can reach by its imports, and which packages of others.

The sources are parsed, nothing is imported: imports inside functions count as well, those under TYPE_CHECKING do not.
What is loaded by name (`importlib`) is not seen; a stage that does so names it in `Stage.plugins`.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from m1 import paths

#: Top-level packages of this project.
OURS = ("flows", "infra", "kernels", "m1", "stages")


@dataclass(frozen=True)
class Closure:
    """What a module can reach, itself included.

    Attributes:
        modules: dotted names of this project's modules; a package stands for its `__init__`.
        packages: top-level names of what is imported from elsewhere, the standard library left out.
    """

    modules: frozenset[str]
    packages: frozenset[str]


def closure(module: str, left_out: Callable[[str], bool] = lambda name: False) -> Closure:
    """Everything that `module` can reach; modules that are left out are not entered either.

    Raises:
        ModuleNotFoundError: there is no such module in the checkout.
    """
    if source_of(module) is None:
        raise ModuleNotFoundError(f"no module {module} below {paths.ROOT}")
    modules: set[str] = set()
    packages: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in modules or left_out(name):
            continue
        path = source_of(name)
        if path is None:
            continue
        modules.add(name)
        waiting += _parents(name)
        for imported in imports(path.read_bytes(), name, path.name == "__init__.py"):
            top = imported.partition(".")[0]
            if top not in OURS:
                if top not in sys.stdlib_module_names:
                    packages.add(top)
                continue
            # `from a import b` means the module a.b, or something that a defines.
            owner = imported if source_of(imported) else imported.rpartition(".")[0]
            waiting.append(owner)
    return Closure(frozenset(modules), frozenset(packages))


def source_of(module: str) -> Path | None:
    """The file of a module or package of the checkout, or None."""
    base = paths.ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _parents(module: str) -> Iterator[str]:
    """Packages whose `__init__` runs before the module does."""
    parts = module.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])


@functools.lru_cache(maxsize=4096)
def imports(source: bytes, module: str, is_package: bool) -> tuple[str, ...]:
    """Dotted names that a source imports, `from a import b` as "a.b"; relative imports made absolute."""
    found: list[str] = []
    package = module if is_package else module.rpartition(".")[0]
    for node in _walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                kept = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            found += [base if alias.name == "*" else f"{base}.{alias.name}" for alias in node.names]
    return tuple(dict.fromkeys(found))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, but without what stands below `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and _is_type_checking(child.test):
            for other in child.orelse:
                yield other
                yield from _walk(other)
            continue
        yield child
        yield from _walk(child)


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else test.id if isinstance(test, ast.Name) else ""
    return name == "TYPE_CHECKING"
