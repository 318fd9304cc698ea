"""What a model wrote, read as a change to a tree, as a test file or as places: text in, a verdict's material out.

The text may hold anything, and its reader decides about a reward. So every function here looks at every line of it a
bounded number of times, without expressions that backtrack, and refuses what is larger than an answer need be. The one
part of the work that is not linear, Python's own parser, is the reason why `reward` calls `read_repair` and `read_test`
through `m1.tasks.confined`.

Search/replace blocks are applied as strictly as diffs are (`patches`): a search part must be found exactly once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from m1.errors import UsageError
from m1.tasks.sandbox import check_path
from m1.tasks.swe.patches import PatchError, Tree, apply_diff, join_lines, no_clash, safe_path, split_lines
from m1.tasks.swe.python_source import MODULE, NotPython, parse

#: A file and an element of it.
Location = tuple[str, str]
SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
FENCE = "```"
#: Characters of an answer that is read at all; the largest gold patch of the packages has some thousands.
MAX_ANSWER = 200_000
#: Files, blocks and hunks that an answer may have: placing each takes a look at a whole file, or the whole tree.
MAX_FILES, MAX_BLOCKS, MAX_HUNKS = 100, 200, 500
#: Characters of a header line of a diff: paths have at most 500.
MAX_HEADER = 4_000


# --- search/replace blocks ---


@dataclass(frozen=True)
class Block:
    """One replacement: `search` empty means that the file is new."""

    path: str
    search: list[str]
    replace: list[str]


def parse_blocks(text: str) -> list[Block]:
    """Blocks of the form that Agentless and aider use: the path on the line before, fences and `###` allowed.

    Raises:
        PatchError: no block, no path, an unfinished block, two dividers in one, or too many blocks.
    """
    blocks: list[Block] = []
    path = ""
    lines = text.split("\n")
    position = 0
    while position < len(lines):
        line = lines[position].rstrip()
        if line == SEARCH:
            end = next((at for at in range(position, len(lines)) if lines[at].rstrip() == REPLACE), None)
            if end is None:
                raise PatchError(f"line {position + 1}: the block has no {REPLACE}")
            body = lines[position + 1 : end]
            dividers = [at for at, inner in enumerate(body) if inner.rstrip() == DIVIDER]
            if len(dividers) != 1 or any(inner.rstrip() == SEARCH for inner in body):
                raise PatchError(f"line {position + 1}: the block has {len(dividers)} dividers, or another inside")
            if not path:
                raise PatchError(f"line {position + 1}: no path before the block")
            search, replace = body[: dividers[0]], body[dividers[0] + 1 :]
            blocks.append(Block(safe_path(path), [row + "\n" for row in search], [row + "\n" for row in replace]))
            if len(blocks) > MAX_BLOCKS:
                raise PatchError(f"more than {MAX_BLOCKS} blocks")
            position = end
        elif line.strip() and not line.lstrip().startswith(FENCE):
            path = line.strip().lstrip("#").strip().strip("`").strip()
        position += 1
    if not blocks:
        raise PatchError(f"no block ({SEARCH}) found")
    return blocks


def apply_blocks(tree: Mapping[str, bytes], text: str) -> Tree:
    """A new tree with the blocks applied one after another.

    Raises:
        PatchError: see the head of this module.
    """
    result = dict(tree)
    for block in parse_blocks(text):
        if not block.search:
            if block.path in result:
                raise PatchError(f"{block.path} exists already, and its search part is empty")
            no_clash(result, block.path)
            result[block.path] = join_lines(block.replace)
            continue
        if block.path not in result:
            raise PatchError(f"{block.path} does not exist")
        # A newline in front makes every start of a line one and the same thing to look for.
        content = "\n" + result[block.path].decode("utf-8", "surrogateescape")
        unended = not content.endswith("\n")
        content += "\n" * unended
        search = "\n" + "".join(block.search)
        at = content.find(search)
        if at < 0 or content.find(search, at + 1) >= 0:
            raise PatchError(f"{block.path}: the search part is found {'0 times' if at < 0 else '2 times or more'}")
        content = content[1 : at + 1] + "".join(block.replace) + content[at + len(search) :]
        content = content[:-1] if unended and content.endswith("\n") else content
        result[block.path] = content.encode("utf-8", "surrogateescape")
    return result


def make_blocks(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> str:
    """Search/replace blocks from `old` to `new`, each as long as it must be to be found once.

    Raises:
        PatchError: a file is deleted, not text, or differs only in its last newline: blocks cannot say so.
    """
    parts: list[tuple[str, list[str], list[str]]] = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) == new.get(path):
            continue
        if path not in new:
            raise PatchError(f"{path}: a block cannot delete a file")
        after = split_lines(new[path])
        if path not in old:
            parts.append((path, [], after))
            continue
        before = split_lines(old[path])
        first, last_old, last_new = _changed_range(before, after)
        places = _occurrences(before, before[first:last_old])
        while last_old == first or places != 1:
            if first == 0 and last_old == len(before):
                raise PatchError(f"{path}: an empty file cannot be searched")
            first, last_old, last_new = (
                max(0, first - 1),
                *((last_old + 1, last_new + 1) if last_old < len(before) else (last_old, last_new)),
            )
            places = _occurrences(before, before[first:last_old])
        parts.append((path, before[first:last_old], after[first:last_new]))
    text = "\n".join(_render_block(*part) for part in parts)
    if text and apply_blocks(old, text) != dict(new):
        raise PatchError("the change cannot be written as search/replace blocks")
    return text


def _changed_range(before: list[str], after: list[str]) -> tuple[int, int, int]:
    """Start (common), end in `before`, end in `after` of the lines that differ."""
    first = 0
    while first < min(len(before), len(after)) and before[first] == after[first]:
        first += 1
    tail = 0
    while tail < min(len(before), len(after)) - first and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    return first, len(before) - tail, len(after) - tail


def _occurrences(lines: list[str], part: list[str]) -> int:
    return sum(lines[at : at + len(part)] == part for at in range(len(lines) - len(part) + 1))


def _render_block(path: str, search: list[str], replace: list[str]) -> str:
    body = "".join(line if line.endswith("\n") else line + "\n" for line in [*search, DIVIDER, *replace])
    return f"### {path}\n{SEARCH}\n{body}{REPLACE}\n"


# --- fences ---


def fenced(text: str, languages: Collection[str]) -> list[str]:
    """Contents of the blocks between a line of three backquotes with one of these words and the next bare such line."""
    blocks: list[str] = []
    inside: list[str] | None = None
    wanted = False
    for line in text.split("\n"):
        if not line.startswith(FENCE):
            if inside is not None:
                inside.append(line)
        elif inside is None:
            inside, wanted = [], line[len(FENCE) :].strip() in languages
        elif line.rstrip() == FENCE:
            if wanted:
                blocks.append("".join(f"{row}\n" for row in inside))
            inside = None
        else:
            inside.append(line)
    return blocks


def code_of_test(answer: str) -> str:
    """The test file of an answer: its last fenced block, or all of it if there is no fence."""
    blocks = fenced(answer, ("python", "py", ""))
    return blocks[-1] if blocks else ("" if FENCE in answer else answer)


# --- places ---

# One class of characters each, so that a match looks at every character once.
_PATH, _ELEMENT = re.compile(r"[\w./+-]+\.py"), re.compile(r"[\w.<>]+")


def parse_locations(answer: str) -> list[Location]:
    """`path: element` lines of an answer, in its order, each once; a path alone stands for its module level."""
    found: dict[Location, None] = {}
    for line in answer.split("\n"):
        path, colon, element = line.lstrip(" \t`*-").rstrip("` \t\r").partition(":")
        element = element.removeprefix(":").lstrip().removeprefix("`").removesuffix("()")
        if _PATH.fullmatch(path.rstrip()) and (_ELEMENT.fullmatch(element) if colon else True):
            found[path.rstrip(), element or MODULE] = None
    return list(found)


# --- an answer as a whole ---


def apply_answer(tree: Mapping[str, bytes], text: str) -> Tree:
    """Apply a patch in whichever form it is written; a fence around it is taken off.

    Raises:
        PatchError: it is in neither form, cannot be applied, or is larger than an answer need be.
    """
    if any(line.rstrip() == SEARCH for line in text.split("\n")):
        result = apply_blocks(tree, text)
    else:
        blocks = fenced(text, ("diff", "patch", ""))
        diff = blocks[0] if blocks else text
        _bounded(diff)
        result = apply_diff(tree, diff)
    _fits(tree, result)
    return result


def _bounded(diff: str) -> None:
    files = hunks = 0
    for line in diff.split("\n"):
        files += line.startswith(("diff --git ", "+++ "))
        hunks += line.startswith("@@ ")
        if len(line) > MAX_HEADER and line.startswith(
            ("diff ", "--- ", "+++ ", "@@ ", "rename ", "copy ", "new ", "old ")
        ):
            raise PatchError(f"a header line of the diff has {len(line)} characters")
    if files > 2 * MAX_FILES or hunks > MAX_HUNKS:
        raise PatchError(f"the diff has more than {MAX_FILES} files or {MAX_HUNKS} hunks")


def _fits(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
    """Whether the tree can be laid out as files: what no file system takes is the answer's fault, not the sandbox's."""
    added = after.keys() - before.keys()
    if len(added) > MAX_FILES:
        raise PatchError(f"{len(added)} new files, at most {MAX_FILES} are read")
    for path in sorted(added):
        try:
            check_path(path)
        except UsageError as error:
            raise PatchError(error.what) from None


@dataclass(frozen=True)
class Repair:
    """What an answer makes of the tree, ready to be run; or why it is not: the name of its end, and a line.

    Attributes:
        tree: with the task's own tests in it; empty if the answer is not to be run.
        end: empty, or `bad-patch`, `empty`, `compile-error`.
    """

    tree: Tree
    end: str = ""
    message: str = ""


def read_repair(faulty: Mapping[str, bytes], tests: Collection[str], test_patch: str, answer: str) -> Repair:
    """Apply an answer to the faulty tree and lay the task's tests over it. No text makes it raise.

    Args:
        tests: files that hold the relevant tests.
    """
    try:
        final = restore(faulty, tests, test_patch, apply_answer(faulty, answer))
        for path in final.keys() - faulty.keys():
            no_clash(final, path)
    except (PatchError, UnicodeError) as error:
        return Repair({}, "bad-patch", str(error))
    if final == dict(faulty):
        return Repair({}, "empty", "the patch changes nothing but tests")
    if broken := compile_error(faulty, final):
        return Repair({}, "compile-error", broken)
    return Repair(final)


def restore(faulty: Mapping[str, bytes], tests: Collection[str], test_patch: str, patched: Mapping[str, bytes]) -> Tree:
    """The patched tree with the tests as the task has them: no answer changes what it is judged by.

    Kept from the faulty tree: test files, everything in folders named `tests` or `test`, `conftest.py` and the files
    that configure pytest; such files that the answer adds are taken out, and so are those that would stand in for a
    module of the standard library. Then the test patch is laid over.

    Raises:
        PatchError: the test patch does not fit what is left.
    """
    final = {
        path: content
        for path, content in patched.items()
        if not is_guarded(path) and not (path not in faulty and _stands_in(path))
    }
    final |= {path: content for path, content in faulty.items() if is_guarded(path)}
    final |= {path: faulty[path] for path in tests if path in faulty}
    return apply_diff(final, test_patch) if test_patch else final


_CONFIGURES = {"conftest.py", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg", "pytest.py",
               "sitecustomize.py", "usercustomize.py", "_pytest"}  # fmt: skip


def is_guarded(path: str) -> bool:
    """Whether a file is a test, or has a say in how tests run: no answer may change it, no fault is put into it."""
    *folders, name = path.split("/")
    in_tests = any(folder in ("tests", "test", "_pytest", "pytest") for folder in folders)
    is_test = name.endswith("_test.py") or (name.startswith("test_") and name.endswith(".py"))
    return in_tests or name in _CONFIGURES or name.endswith(".pth") or is_test


def _stands_in(path: str) -> bool:
    """Whether a new file would be found in place of a module that tests and pytest import, or is not source at all."""
    first = path.removeprefix("src/").split("/")[0]
    return first.partition(".")[0] in sys.stdlib_module_names or path.endswith((".pyc", ".so", ".pyd"))


def compile_error(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """The first changed Python file that does not parse, with the reason; empty if all do."""
    for path in sorted(after):
        if path.endswith(".py") and before.get(path) != after[path]:
            try:
                parse(after[path])
            except NotPython as error:
                return f"{path}: {error}"
    return ""


def read_test(answer: str) -> tuple[str, str, str]:
    """(code, end, message) of an answer that is a test file; `end` is empty, `empty` or `compile-error`."""
    code = code_of_test(answer)
    if not code.strip():
        return "", "empty", ""
    try:
        parse(code.encode("utf-8"))
    except (NotPython, UnicodeError) as error:
        return "", "compile-error", str(error)
    return code, "", ""
