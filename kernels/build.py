"""Compile the C++ kernels once per machine type and load them.

The sources have no dependency but the compiler: they are built by one compiler call (a few seconds) into a cache
folder, under a name made of everything that the result depends on. A build is written under a temporary name and
renamed, so that processes that build at the same time cannot see each other's half-written file. Without a
compiler, or with ``M1_KERNELS_NATIVE=0``, ``load`` logs why and returns None; the caller then uses plain torch
operations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "csrc"
SOURCES = sorted(FOLDER.glob("*.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-Wno-psabi")
# OpenMP first; a compiler without it still gives the single-threaded kernel.
FLAG_SETS = ((*FLAGS, "-fopenmp"), FLAGS)
BUILD_SECONDS = 300
#: Each takes the address of one structure.
FUNCTIONS = (
    "lightning_forward", "lightning_backward", "lightning_decode", "norm_forward", "norm_backward", "swiglu_forward",
    "swiglu_backward", "cross_entropy_forward", "cross_entropy_backward",
)  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL | None:
    """The compiled kernel, built if need be, or None where it cannot be had. Decided once per process."""
    if os.environ.get("M1_KERNELS_NATIVE") == "0":
        logger.info("compiled kernels switched off by M1_KERNELS_NATIVE=0; using torch operations")
        return None
    try:
        library = ctypes.CDLL(str(_build()))
        for name in FUNCTIONS:
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], None
        return library
    except (OSError, AttributeError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning("no compiled kernels, using torch operations (slower, same numbers): %s", error)
        return None


def _build() -> Path:
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
    if not compiler:
        raise RuntimeError("no C++ compiler found (g++ or clang++; or set CXX)")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=BUILD_SECONDS).stdout
    key = hashlib.sha256()
    for part in (
        *(file.read_bytes() for file in sorted(FOLDER.iterdir())),
        repr(FLAG_SETS).encode(),
        version,
        _processor(),
    ):
        key.update(part)
    target = _cache_folder() / f"kernels-{key.hexdigest()[:20]}.so"
    if not target.exists():
        _compile(compiler, target)
    return target


def _compile(compiler: list[str], target: Path) -> None:
    logger.info("compiling the kernels into %s", target)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        for flags in FLAG_SETS:
            command = [*compiler, *flags, *map(str, SOURCES), "-o", temporary]
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=BUILD_SECONDS, encoding="utf-8", errors="replace"
            )
            if result.returncode == 0:
                os.replace(temporary, target)
                return
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    finally:
        Path(temporary).unlink(missing_ok=True)


def _processor() -> bytes:
    """What -march=native looks at: caches shared by unlike machines must not share a build."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"Features", b"model"))}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


def _cache_folder() -> Path:
    base = os.environ.get("M1_KERNELS_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "m1-kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    # A read-only home: a private folder of this process, removed by nobody but the system's cleaning of /tmp.
    return Path(tempfile.mkdtemp(prefix="m1-kernels-"))
