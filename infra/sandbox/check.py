"""What the engine can do, and whether a container of ours is isolated as it should be."""

from __future__ import annotations

from pathlib import Path

from infra.sandbox import engine, images
from infra.sandbox.runner import Sandbox
from m1.errors import ServiceError
from m1.tasks.sandbox import Job, Kind, Limits

#: Run inside: prints what the job can see of its own confinement.
_LOOK = """
import ctypes, os, socket
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
print("user", os.getuid())
print("capabilities", int(status["CapBnd"], 16) | int(status["CapEff"], 16))
print("no-new-privileges", status["NoNewPrivs"].strip())
print("seccomp", status["Seccomp"].strip())
print("interfaces", ",".join(name for _, name in socket.if_nameindex()))
try:
    open("/written", "w")
    print("root writable")
except OSError:
    print("root read-only")
try:
    socket.socket(40, socket.SOCK_STREAM)
    print("sockets to the hypervisor open")
except OSError:
    print("sockets to the hypervisor refused")
ring = ctypes.CDLL(None).syscall(425, 8, ctypes.create_string_buffer(256))
print("io_uring", "refused" if ring == -1 else "open")
"""
_EXPECTED = (
    "user 1000\ncapabilities 0\nno-new-privileges 1\nseccomp 2\ninterfaces lo\nroot read-only\n"
    "sockets to the hypervisor refused\nio_uring refused"
)

Row = tuple[str, str, str]


def check_sandbox(image: str | None = None, runtime: str | None = None) -> tuple[list[Row], bool]:
    """Rows of what, state and finding, and whether jobs can be run safely.

    Raises:
        ServiceError: no engine answers, or it does not have the image or the runtime.
    """
    found = engine.describe()
    rows: list[Row] = [
        (
            "engine",
            "ok",
            f"docker {found['version']}, API {found['api']}, {found['storage']}, cgroup v{found['cgroup']}",
        ),
        ("runtimes", "ok", f"{', '.join(found['runtimes'])}; default {found['default_runtime']}"),
        *_limits(found["limits"]),
    ]
    made = [entry.tag for entry in images.list_images() if entry.tag.startswith(images.ENVIRONMENT)]
    image = image or (made[0] if made else None)
    if image is None:
        rows.append(("trial job", "note", "no image yet; build one with `m1 sandbox build`"))
    else:
        rows.append(_trial(image, runtime))
    return rows, all(state != "bad" for _, state, _ in rows)


def newest_with_pytest() -> str:
    """The newest environment that has pytest.

    Raises:
        ServiceError: the engine has none.
    """
    found = [i.tag for i in images.list_images() if any(package.startswith("pytest==") for package in i.packages)]
    if not found:
        raise ServiceError("the engine has no environment with pytest", "Build one with `m1 sandbox build`.")
    return found[0]


def _limits(known: dict[str, bool]) -> list[Row]:
    missing = [name for name, there in known.items() if not there]
    # Without swap accounting the kernel still holds memory; a machine with swap could exceed it there.
    harmless = set(missing) <= {"swap"} and len(Path("/proc/swaps").read_text(encoding="utf-8").splitlines()) <= 1
    state = "ok" if not missing else "note" if harmless else "bad"
    return [("limits", state, "the kernel does not limit " + ", ".join(missing) if missing else ", ".join(known))]


def _trial(image: str, runtime: str | None) -> Row:
    with Sandbox(image, runtime=runtime, warm=0) as sandbox:
        result = sandbox.run(Job({}, ["python3", "-I", "-c", _LOOK], Limits(seconds=30)))
    seen = result.output.strip()
    if result.kind is Kind.OK and seen == _EXPECTED:
        return "trial job", "ok", f"{image}: {'; '.join(seen.splitlines())}"
    wrong = sorted(set(seen.splitlines()) - set(_EXPECTED.splitlines())) or [result.message]
    return "trial job", "bad", f"{image}: {result.kind.value}: {'; '.join(wrong)}"
