"""Trees of files to make tasks from: pinned source distributions of packages, and local git repositories.

Nothing of a source is built, installed or imported on the host: archives are read member by member, commits through
git's own plumbing, without a checkout and so without its hooks and filters.
"""

from __future__ import annotations

import fnmatch
import lzma
import os
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from m1 import paths
from m1.config.reading import describe, read_yaml
from m1.data.corpus_spec import PypiSource, Sha256
from m1.data.fetch import fetch
from m1.errors import M1Error, UsageError
from m1.tasks.swe.github import slug_of_url
from m1.tasks.swe.patches import PatchError, Tree, safe_path

#: A source larger than this is not for a sandbox of some hundred MB.
MAX_BYTES, MAX_FILES = 64 << 20, 10_000

Split = Literal["train", "heldout"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Origin(_Part):
    """What every source states. Paths are relative to the top folder of the sdist, or of the repository."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    licence: str = Field(min_length=2, description="SPDX expression, as the source itself declares it")
    split: Split = "train"
    code: list[str] = Field(min_length=1, description="folders or files whose Python may hold the fault")
    tests: list[str] = Field(min_length=1, description="folders or files that pytest collects")
    import_root: str = Field(".", description="folder to put on the import path")
    exclude: list[str] = Field([], description="patterns of files left out of the tree")
    environment: str = "default"
    deselect: list[str] = Field([], description="tests left out, as pytest's --deselect takes them")

    def is_test(self, path: str) -> bool:
        return _below(path, self.tests)

    def is_code(self, path: str) -> bool:
        """Whether a file may hold the fault: Python, below `code`, no test."""
        return path.endswith(".py") and _below(path, self.code) and not self.is_test(path)


class Package(_Origin):
    """A source distribution, named by version and SHA-256."""

    package: str = Field(min_length=1)
    version: str = Field(min_length=1)
    sha256: Sha256

    def archive(self) -> Path:
        """The sdist in the cache, fetched if need be and checked; see `m1.data.fetch`."""
        return fetch(
            PypiSource(
                name=self.name, licence=self.licence, domain="code", weight=1.0, format="python", kind="pypi-sdist",
                include=["**"], licence_files=["**"], package=self.package, version=self.version, sha256=self.sha256,
            )
        )  # fmt: skip

    def tree(self) -> Tree:
        return without(read_archive(self.archive()), self.exclude)


class Repository(_Origin):
    """A git repository on this machine; faults are its real commits, reverted."""

    path: str = Field(description="folder of the repository, relative to the checkout unless absolute")
    revision: str = Field("HEAD", pattern=r"^[^-].*$", description="newest commit looked at")
    github: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name there; by default what its remotes say"
    )
    commits: int = Field(200, ge=1, description="how many commits of its first-parent history are looked at")

    @property
    def folder(self) -> Path:
        return paths.ROOT / self.path

    def names_on_github(self) -> set[str]:
        """owner/name, in lower case: what the spec says, else of every remote of the clone; empty if neither does.

        Raises:
            M1Error: no git, or no repository.
        """
        if self.github is not None:
            return {self.github.lower()}
        listed = git(self.folder, "config", "--get-regexp", r"^remote\..*\.url$", allowed=(0, 1))
        urls = (line.partition(" ")[2] for line in listed.decode("utf-8", "replace").split("\n"))
        return {slug for url in urls if (slug := slug_of_url(url))}


class Environment(_Part):
    """What the tests need installed beside the package; the image is built from it."""

    requirements: list[str]


class SweSpec(_Part):
    """Sources of software-engineering tasks."""

    description: str
    environments: dict[str, Environment]
    packages: list[Package] = []
    repositories: list[Repository] = []

    @property
    def origins(self) -> list[Package | Repository]:
        return [*self.packages, *self.repositories]

    @model_validator(mode="after")
    def _consistent(self) -> SweSpec:
        names = [origin.name for origin in self.origins]
        if not names:
            raise ValueError("no packages and no repositories")
        for origin in self.origins:
            if names.count(origin.name) > 1:
                raise ValueError(f"two sources are named {origin.name}")
            if origin.environment not in self.environments:
                raise ValueError(f"{origin.name}: no environment {origin.environment}; known: {[*self.environments]}")
        return self


def load(path: Path) -> SweSpec:
    """Read and check a spec.

    Raises:
        UsageError: the file is missing or not YAML, or a field is unknown, mistyped or impossible.
    """
    try:
        content = read_yaml(path)
        return SweSpec.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{path}: {describe(error, SweSpec, content)}", "Correct the file.") from error


def _below(path: str, places: Iterable[str]) -> bool:
    return any(place == "." or path == place or path.startswith(place.rstrip("/") + "/") for place in places)


def without(tree: Tree, patterns: Iterable[str]) -> Tree:
    """The tree less the files that match one of the patterns."""
    patterns = list(patterns)
    return {path: c for path, c in tree.items() if not any(fnmatch.fnmatchcase(path, p) for p in patterns)}


# --- archives ---


def read_archive(archive: Path) -> Tree:
    """Regular files of an sdist (.tar.gz or .zip), relative to its one top folder.

    Links and git's own files are left out.

    Raises:
        UsageError: not an archive, a member that leaves the tree, or more than `MAX_BYTES` or `MAX_FILES`.
    """
    try:
        if zipfile.is_zipfile(archive):
            members = _zip_members(archive)
        else:
            members = _tar_members(archive)
    except _DAMAGED as error:
        raise UsageError(
            f"{archive}: cannot be read as an archive: {error}", "Remove it and fetch it again."
        ) from error
    tops = {name.split("/")[0] for name in members}
    if len(tops) == 1 and all("/" in name for name in members):
        members = {name.partition("/")[2]: content for name, content in members.items()}
    members = {name: content for name, content in members.items() if ".git" not in name.split("/") and _is_text(name)}
    try:
        return {safe_path(name): members[name] for name in sorted(members)}
    except PatchError as error:
        raise UsageError(f"{archive}: {error}", "Do not use this archive.") from error


#: What the standard library raises of archives that are cut short, encrypted, packed in an unknown way or not archives.
_DAMAGED = (
    tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError, RuntimeError, ValueError,
)  # fmt: skip


def _is_text(name: str) -> bool:
    """Whether a name is in UTF-8: no patch can speak of any other."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tar_members(archive: Path) -> Tree:
    members: Tree = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg():
                _check_size(archive, len(members), member.size)
                file = tar.extractfile(member)
                assert file is not None
                members[member.name.removeprefix("./")] = file.read()
                _check_size(archive, len(members), sum(map(len, members.values())))
    return members


def _zip_members(archive: Path) -> Tree:
    with zipfile.ZipFile(archive) as container:
        files = [info for info in container.infolist() if not info.is_dir()]
        _check_size(archive, len(files), sum(info.file_size for info in files))
        return {info.filename: container.read(info) for info in files}


def _check_size(where: Path, files: int, size: int) -> None:
    if files > MAX_FILES or size > MAX_BYTES:
        raise UsageError(
            f"{where}: more than {MAX_FILES} files or {MAX_BYTES >> 20} MB",
            "Choose a smaller source, or exclude files.",
        )


# --- git ---


def git(folder: Path, *arguments: str, allowed: tuple[int, ...] = (0,)) -> bytes:
    """Output of a git command that only reads. `allowed` are the exit codes that are no failure.

    Raises:
        M1Error: git is missing or fails; what it says first of the cause is in the message.
    """
    try:
        done = subprocess.run([*_GIT, str(folder), *arguments], capture_output=True, check=False, env=_environment())
    except FileNotFoundError as error:
        raise M1Error("git is not on this machine", "Install it.") from error
    if done.returncode not in allowed:
        said = done.stderr.decode("utf-8", "replace").strip().split("\n")
        reason = next((line for line in said if line.startswith("fatal: ")), said[0] or "no message")
        raise M1Error(f"{folder}: git {arguments[0]} failed: {reason}", "Check the repository and the revision.")
    return done.stdout


_GIT = ("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "-C")


def _environment() -> dict[str, str]:
    """Without what names another repository than the folder's; git neither asks nor fetches what is missing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return {**kept, "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_REPLACE_OBJECTS": "1"}


def commit_of(folder: Path, revision: str) -> str:
    """The hash of the commit that a revision names.

    Raises:
        M1Error: no repository, or no such commit in it.
    """
    git(folder, "rev-parse", "--git-dir")  # is it a repository at all?
    found = git(
        folder, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", allowed=(0, 1, 128)
    )
    if not found.strip():
        raise M1Error(f"{folder} has no commit {revision}", "Fetch the whole repository, or name another revision.")
    return found.decode("ascii").strip()


def parent_of(folder: Path, commit: str) -> str:
    """The hash of a commit's first parent.

    Raises:
        M1Error: no repository, no such commit, or it has no parent.
    """
    listed = git(folder, "rev-list", "--parents", "-n1", commit_of(folder, commit)).decode("ascii").split()
    if len(listed) < 2:
        raise M1Error(f"{folder}: commit {commit} has no parent", "Fetch the whole history, or leave it out.")
    return listed[1]


def read_commit(folder: Path, commit: str, exclude: Iterable[str] = ()) -> Tree:
    """Regular files of a commit; links and submodules are left out.

    Raises:
        M1Error: no repository, no such commit.
        UsageError: more than `MAX_BYTES` or `MAX_FILES`.
    """
    listed = git(folder, "ls-tree", "-r", "-z", "--full-tree", commit_of(folder, commit)).split(b"\0")[:-1]
    wanted: Tree = {}
    for entry in listed:
        info, _, name = entry.partition(b"\t")
        mode, kind, digest = info.split()
        if kind == b"blob" and mode != b"120000":
            try:
                wanted[safe_path(name.decode("utf-8"))] = digest
            except (PatchError, UnicodeDecodeError):
                continue  # a name that no patch can speak of
    wanted = without(wanted, exclude)
    _check_size(folder, len(wanted), 0)
    return _read_blobs(folder, wanted)


def _read_blobs(folder: Path, wanted: Tree) -> Tree:
    """Contents of blobs through one `git cat-file --batch`."""
    with subprocess.Popen(
        [*_GIT, str(folder), "cat-file", "--batch"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        tree: Tree = {}
        total = 0
        for path, digest in wanted.items():
            process.stdin.write(digest + b"\n")
            process.stdin.flush()
            header = process.stdout.readline().split()
            if len(header) != 3:
                process.kill()
                raise M1Error(f"{folder}: git has no content for {path}", "Fetch the whole repository.")
            size = int(header[2])
            total += size
            if total > MAX_BYTES:
                process.kill()
                _check_size(folder, len(wanted), total)
            tree[path] = process.stdout.read(size)
            process.stdout.read(1)
        process.stdin.close()
    return tree
