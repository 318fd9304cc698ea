"""Images of the sandbox: content-addressed, built without any registry.

A base holds Python and a shell; it comes from debootstrap, from an image that the engine has or can pull, or from the
Python that runs this program. An environment is the base and one layer of pinned packages. Nothing of a package is
executed while an image is made: packages are wheels, unpacked here. Python sources are compiled once, in the engine, by
the image's own Python: when every container compiled pytest again, that took most of a job's time.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import docker.errors

from infra.sandbox import engine
from infra.sandbox.container import COMPILED, JOB_USER, KEEPER_USER
from infra.sandbox.runner import PACKAGES
from m1.errors import ServiceError, UsageError

BASE, ENVIRONMENT = "m1-sandbox-base", "m1-swe-"
CONTENT = "m1.sandbox.content"
#: "3.11 /usr/lib/python3/dist-packages": version and folder for packages of a base.
PYTHON = "m1.sandbox.python"
#: Raise it when what is made here changes.
FORMAT = 2
SUITE, MIRROR, INCLUDE = "bookworm", "http://deb.debian.org/debian", "python3"
DEFAULT_REQUIREMENTS = ("pytest==9.2.0",)
_PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==[A-Za-z0-9.!+_-]+")
#: Compiled files do not look at their sources' times: the root that both lie on is read-only.
_COMPILE = (
    "import compileall, py_compile, sys, sysconfig\n"
    "mode = py_compile.PycInvalidationMode.UNCHECKED_HASH\n"
    "folder = sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path('stdlib')\n"
    "compileall.compile_dir(folder, quiet=2, workers=0, invalidation_mode=mode)\n"
)
#: Programs of this machine that go along with a copy of its Python.
_TOOLS = ("sh", "cat", "ls", "env", "sleep", "mkdir", "rm", "cp", "mv", "chmod", "head", "tail", "grep", "sed", "ln")
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "tkinter", "turtledemo"}
_LEFT_OUT |= {"ensurepip", "lib2to3"}


@dataclass(frozen=True)
class Image:
    """One image of ours.

    Attributes:
        tag: name to give to `Sandbox`; content: digest of all that went in; packages: what is installed on top.
    """

    tag: str
    content: str
    size: int
    created: str
    packages: tuple[str, ...]


def build_base(method: str = "debootstrap", *, mirror: str = MIRROR, force: bool = False) -> str:
    """Make the base image, or find it; return its tag.

    Args:
        method: "debootstrap" (needs root and a Debian mirror), "host-python" (the Python that runs this program, for
            tests and for machines without a mirror), or the name of an image with Python that the engine has or can
            pull.
        force: make it although it is there.

    Raises:
        ServiceError: the engine, debootstrap or the given base fails.
    """
    if method == "debootstrap":
        recipe: list[Any] = [SUITE, INCLUDE]
    elif method == "host-python":
        recipe = [sys.version, sysconfig.get_path("stdlib"), platform.machine(), _TOOLS]
    else:
        recipe = [_given(method)]
    content = _digest(["base", FORMAT, method, recipe])
    tag = f"{BASE}:{content}"
    if not force and _find(tag):
        return tag
    with engine.explained(f"making {tag}"):
        if method == "debootstrap":
            imported = _import(lambda out: _debootstrap(out, mirror))
        elif method == "host-python":
            imported = _import(_host_python)
        else:
            imported = method
        python = _ask_python(imported)
        _layer(imported, tag, {engine.LABEL: "base", CONTENT: content, PYTHON: python}, _users())
    return tag


def build_environment(name: str, requirements: list[str], base: str | None = None, *, force: bool = False) -> str:
    """Make the image `m1-swe-<name>` with pinned packages on top of the base, or find it; return its tag.

    The tag names the content; `m1-swe-<name>` alone means the one that was made or found last.

    Args:
        requirements: "name==version" each; what they need in turn is resolved and listed in the image.
        base: tag of a base; None for the newest, or if there is none a copy of this Python, which needs neither root
            nor a mirror.

    Raises:
        UsageError: a name or a requirement is not of its form.
        ServiceError: the engine or pip fails.
    """
    if not re.fullmatch(r"[a-z0-9]+([._-][a-z0-9]+)*", name):
        raise UsageError(f"environment {name!r} is no image name", "Use small letters, digits, '-' and '.'.")
    for requirement in requirements:
        if not _PINNED.fullmatch(requirement):
            raise UsageError(f"requirement {requirement!r} is not pinned", "Write name==version.")
    bases = [image.tag for image in list_images() if image.tag.startswith(f"{BASE}:")]
    base = base or (bases[0] if bases else build_base("host-python"))
    found = _find(base)
    if found is None:
        raise ServiceError(f"the engine has no base image {base!r}", "Build it with `m1 sandbox build`.")
    content = _digest(["environment", FORMAT, found["Id"], sorted(requirements)])
    tag = f"{ENVIRONMENT}{name}:{content}"
    with engine.explained(f"making {tag}"):
        if force or _find(tag) is None:
            version, folder = found["Config"]["Labels"][PYTHON].split(" ", 1)
            packages, layer = _install(requirements, version, folder)
            labels = {engine.LABEL: "environment", CONTENT: content, PACKAGES: " ".join(packages)}
            _layer(base, tag, labels, layer, folder)
        engine.client().tag(tag, f"{ENVIRONMENT}{name}", "latest")
    return tag


def list_images() -> list[Image]:
    """All images of ours that the engine holds, newest first.

    Raises:
        ServiceError: no engine answers.
    """
    with engine.explained("listing images"):
        found = engine.client().images(filters={"label": CONTENT})
    images = []
    for image in sorted(found, key=lambda image: -image["Created"]):
        labels = image["Labels"]
        created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(image["Created"]))
        for tag in sorted(image["RepoTags"] or []):
            if not tag.endswith(":latest") and not tag.startswith("<none>"):
                packages = tuple(labels.get(PACKAGES, "").split())
                images.append(Image(tag, labels[CONTENT], image["Size"], created, packages))
    return images


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _find(tag: str) -> dict[str, Any] | None:
    try:
        with engine.explained(f"looking for {tag}"):
            found: dict[str, Any] = engine.client().inspect_image(tag)
            return found
    except ServiceError as error:
        if isinstance(error.__cause__, docker.errors.ImageNotFound):
            return None
        raise


def _given(image: str) -> str:
    """Id of a given image, pulled if the engine does not have it.

    Raises:
        ServiceError: neither.
    """
    found = _find(image)
    if found is None:
        try:
            engine.client().pull(image)
        except engine.FAULTS as error:
            raise ServiceError(
                f"base image {image!r} is neither here nor can it be pulled ({error})",
                "Give --base debootstrap or --base host-python.",
            ) from error
        found = _find(image)
    assert found is not None
    return str(found["Id"])


# -- bases


def _import(write: Any) -> str:
    """Import a root file system, written by `write(file)` as a tar archive; returns the image's id."""
    with tempfile.TemporaryFile() as file:
        write(file)
        file.seek(0)
        pieces = iter(lambda: file.read(1 << 20), b"")
        answer = engine.client().import_image_from_stream(pieces)
    last = json.loads(answer.strip().splitlines()[-1])
    if "status" not in last:
        raise ServiceError(f"the engine did not import the file system: {last}", "See `m1 sandbox check`.")
    return str(last["status"])


def _debootstrap(out: IO[bytes], mirror: str) -> None:
    program = shutil.which("debootstrap") or shutil.which("debootstrap", path="/usr/sbin:/sbin")
    if program is None:
        raise ServiceError("debootstrap is not installed", "Run `sudo infra/sandbox/engine.sh`, or apt-get install it.")
    with tempfile.TemporaryDirectory(prefix="m1-base-") as folder:
        root = f"{folder}/root"
        command = [program, "--variant=minbase", f"--include={INCLUDE}", SUITE, root, mirror]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        if done.returncode != 0:
            last = " ".join(done.stdout.strip().splitlines()[-2:])
            raise ServiceError(f"debootstrap failed: {last}", "Run it as root, with --mirror for another mirror.")
        for waste in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
            shutil.rmtree(f"{root}/{waste}", ignore_errors=True)
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.add(root, arcname=".", filter=_no_devices)


def _no_devices(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    entry.mode &= 0o1777  # nothing is setuid
    return None if entry.isdev() else entry


def _host_python(out: IO[bytes]) -> None:
    """This Python's standard library, a few tools, and the shared libraries that they need."""
    library = Path(sysconfig.get_path("stdlib"))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    program = Path(sys.executable).resolve()
    objects = [program, *library.glob("lib-dynload/*.so")]
    with tarfile.open(fileobj=out, mode="w") as tar:
        for folder in ("bin", "usr/bin", "tmp", "work", "proc", "sys", "dev", "etc"):
            _add_folder(tar, folder)
        tar.add(program, f"usr/local/bin/{version}", filter=_as_root)
        _add_link(tar, "usr/local/bin/python3", version)
        _add_link(tar, "usr/local/bin/python", version)
        tar.add(library, f"usr/local/lib/{version}", filter=_needed)
        for tool in _TOOLS:
            if path := shutil.which(tool, path="/bin:/usr/bin"):
                tar.add(Path(path).resolve(), f"bin/{tool}", filter=_as_root)
                objects.append(Path(path).resolve())
        _add_link(tar, "usr/bin/env", "/bin/env")
        for path in sorted(_shared_libraries(objects)):
            tar.add(Path(path).resolve(), path.lstrip("/"), filter=_as_root)


def _as_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mode = (entry.mode & 0o755) | (0o555 if entry.isdir() else 0o444)
    return entry


def _needed(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(entry.name).name
    return None if name in _LEFT_OUT or name.startswith("config-") or name.endswith(".a") else _as_root(entry)


def _shared_libraries(objects: list[Path]) -> set[str]:
    """Absolute paths, as the loader looks for them, of all libraries that `objects` need."""
    found: set[str] = set()
    for path in objects:
        listing = subprocess.run(
            ["ldd", str(path)], capture_output=True, text=True, encoding="utf-8", errors="replace"
        ).stdout
        found |= set(re.findall(r"(/\S+) \(0x", listing))
    return found


def _add_folder(tar: tarfile.TarFile, name: str, mode: int = 0o755) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    tar.addfile(entry)


def _add_link(tar: tarfile.TarFile, name: str, target: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    tar.addfile(entry)


def _ask_python(image: str) -> str:
    """Version and folder for packages of the image's Python, asked in a container without network."""
    api = engine.client()
    code = "import site, sys; print('%d.%d' % sys.version_info[:2], site.getsitepackages()[0])"
    made = api.create_container(
        image,
        ["python3", "-I", "-c", code],
        entrypoint=[],
        user=JOB_USER,
        labels={engine.LABEL: "build", engine.OWNER: engine.owner()},
        host_config=api.create_host_config(network_mode="none", cap_drop=["ALL"], read_only=True),
    )
    try:
        api.start(made)
        code = api.wait(made)["StatusCode"]
        answer = api.logs(made).decode(errors="replace").strip()
    finally:
        engine.remove(made["Id"])
    if code != 0 or not re.fullmatch(r"3\.\d+ /\S+", answer):
        raise ServiceError(f"image {image} has no usable python3: {answer[:300]}", "Give a base that has one.")
    return str(answer)


# -- layers


def _users() -> bytes:
    """Names for the two users, and the folders that are mounted over."""
    names = {"root": (0, "/root"), "m1-job": (int(JOB_USER.split(":")[0]), "/tmp")}
    names["m1-keeper"] = (int(KEEPER_USER.split(":")[0]), "/nonexistent")
    passwd = "".join(f"{name}:x:{number}:{number}::{home}:/bin/sh\n" for name, (number, home) in names.items())
    group = "".join(f"{name}:x:{number}:\n" for name, (number, _) in names.items())
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        _add_folder(tar, "etc")
        for folder in ("work", "tmp"):  # runc gives what is mounted there the mode of the folder
            _add_folder(tar, folder, 0o1777)
        for name, text in (("etc/passwd", passwd), ("etc/group", group)):
            _add_file(tar, name, text.encode())
    return file.getvalue()


def _add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


def _install(requirements: list[str], version: str, folder: str) -> tuple[list[str], bytes]:
    """Packages with their versions, and a layer that holds them in `folder`.

    Raises:
        ServiceError: pip fails, for example since a package has no wheel.
    """
    with tempfile.TemporaryDirectory(prefix="m1-layer-") as target:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        command += ["--only-binary=:all:", f"--python-version={version}", "--implementation=cp"]
        command += ["--target", target, *sorted(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        if done.returncode != 0:
            last = " ".join(done.stderr.strip().splitlines()[-2:])
            raise ServiceError(f"pip could not get {' '.join(requirements)}: {last}", "Only wheels are taken.")
        packages = sorted(_names(Path(target)), key=str.lower)
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.add(target, folder.lstrip("/"), filter=_as_root)
    return packages, file.getvalue()


def _names(target: Path) -> Iterator[str]:
    for metadata in target.glob("*.dist-info/METADATA"):
        fields = dict(
            re.findall(r"^(Name|Version): (\S+)$", metadata.read_text(errors="replace", encoding="utf-8"), re.M)
        )
        yield f"{fields['Name']}=={fields['Version']}"


def _layer(base: str, tag: str, labels: dict[str, str], layer: bytes, folder: str | None = None) -> None:
    """Image `tag`: `base`, one layer from a tar archive, labels, and what Python made of the sources in `folder`.

    Args:
        folder: by default that of the standard library.
    """
    compilation = ["python3", "-P", "-s", "-c", _COMPILE, *([folder] if folder else [])]
    lines = [
        f"FROM {base}",
        "ADD layer.tar /",
        f"ENV PYTHONPYCACHEPREFIX={COMPILED}",
        f"RUN {json.dumps(compilation)}",
        *(f"LABEL {name}={json.dumps(value)}" for name, value in labels.items()),
    ]
    lines += ["ENTRYPOINT []", "WORKDIR /"]
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        _add_file(tar, "Dockerfile", "\n".join(lines).encode())
        _add_file(tar, "layer.tar", layer)
    context.seek(0)
    answers = engine.client().build(
        fileobj=context, custom_context=True, tag=tag, rm=True, network_mode="none", decode=True
    )
    for answer in answers:
        if "error" in answer:
            raise ServiceError(f"the engine could not make {tag}: {answer['error'].strip()}", "See `m1 sandbox check`.")
