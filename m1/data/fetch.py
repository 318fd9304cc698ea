"""Archives of the sources: fetched once, checked by SHA-256, kept in a cache outside the checkout.

Packages come from whatever index this machine's pip is configured for (index, mirrors, certificates, credentials,
find-links): pip's own finder and session do the look-up and the transfer. `pip download` itself is not used, because
for an sdist it runs the package's build code, and a corpus needs the files only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from m1.data.corpus_spec import DebianSource, PypiSource
from m1.errors import M1Error, UsageError

_CHUNK = 1 << 20


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/m1/sources`, by default `~/.cache/m1/sources`; one file per archive, named by its SHA-256."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "m1" / "sources"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: PypiSource | DebianSource) -> Path:
    """The source's archive in the cache, downloaded if it is not there.

    A cached file is checked again: a damaged one is replaced, never used.

    Raises:
        UsageError: the archive has another SHA-256 than the spec says.
        M1Error: the archive cannot be had (network, index, no such version).
    """
    final = cache_dir() / source.sha256
    if final.is_file():
        if sha256_of(final) == source.sha256:
            return final
        final.unlink()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=final.parent) as folder:
        if isinstance(source, DebianSource):
            archive = _download_debian(source, Path(folder))
        else:
            archive = _download_pypi(source, Path(folder))
        found = sha256_of(archive)
        if found != source.sha256:
            raise UsageError(
                f"source {source.name}: {source.package} {source.version} has sha256 {found}, the spec says "
                f"{source.sha256}",
                "Do not use the file before you know why; if the new archive is right, correct sha256 in the spec.",
            )
        os.replace(archive, final)
    return final


def _download_pypi(source: PypiSource, folder: Path) -> Path:
    """Download an sdist or a wheel to `folder` with pip's finder and session."""
    by_hand = f"Correct pip's configuration, or put the archive at {cache_dir() / source.sha256} by hand."
    archive_kind = source.kind.removeprefix("pypi-")
    what = f"source {source.name}: cannot download the {archive_kind} of {source.package} {source.version}"
    try:
        logging.getLogger("pip").setLevel(logging.ERROR)
        # Not a public interface of pip, but the only one that honours all of its configuration.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pip's import remarks on other packages
            from pip._internal.commands import create_command

        command: Any = create_command("download")
        form = "--no-binary" if source.kind == "pypi-sdist" else "--only-binary"
        options, _ = command.parse_args([form, ":all:", "--no-deps", source.package])
        with command._build_session(options) as session:
            finder = command._build_package_finder(options, session, ignore_requires_python=True)
            links = [c.link for c in finder.find_all_candidates(source.package) if str(c.version) == source.version]
            if not links:
                raise M1Error(f"{what}: the index does not list it", by_hand)
            link = _choose(links, source.sha256)
            archive = folder / "archive"
            response = session.get(link.url_without_fragment, headers={"Accept-Encoding": "identity"}, stream=True)
            response.raise_for_status()
            _write(archive, response.iter_content(_CHUNK), response.headers.get("Content-Length"))
            return archive
    except (M1Error, OSError) as error:
        if isinstance(error, M1Error) or error.errno is not None:
            raise  # our own message, or the disk's (full, read-only), which the stage's command words
        raise M1Error(f"{what}: {error}", by_hand) from error  # requests' errors are OSErrors without errno
    except Exception as error:  # pip raises its own kinds, and another pip may have changed what is used here
        raise M1Error(f"{what}: {type(error).__name__}: {error}", by_hand) from error


def _choose(links: list[Any], sha256: str) -> Any:
    """The link whose announced hash is the one asked for, else the first."""
    return next((link for link in links if link.hash == sha256), links[0])


def _write(path: Path, chunks: Iterable[bytes], announced: str | int | None) -> None:
    written = 0
    with open(path, "wb") as file:
        for chunk in chunks:
            written += file.write(chunk)
    if announced is not None and written != int(announced):
        raise M1Error(f"download ended after {written} of {announced} bytes", "Run it again.")


def _download_debian(source: DebianSource, folder: Path) -> Path:
    """Download a .deb to `folder` with apt-get; needs Debian or Ubuntu, not root."""
    command = ["apt-get", "download", f"{source.package}={source.version}"]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError as error:
        raise M1Error(f"source {source.name}: apt-get is not on this machine", "Leave Debian sources out.") from error
    archives = list(folder.glob("*.deb"))
    if done.returncode or len(archives) != 1:
        reason = (done.stderr.strip().splitlines() or ["no archive was written"])[-1]
        raise M1Error(f"source {source.name}: {' '.join(command)} failed: {reason}", "Run apt-get update, then rerun.")
    return archives[0]
