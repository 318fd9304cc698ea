"""The Docker engine: where it is, what it can do, and containers that dead runners have left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import docker
import docker.errors
import psutil
import requests

from infra.process import start_mark
from m1.errors import ServiceError

#: On every container and image of ours.
LABEL = "m1.sandbox"
#: host:pid:start of the process that made the container; see `infra.process.start_mark`.
OWNER = "m1.sandbox.owner"
#: Seconds that any one call to the engine may take.
PATIENCE = 120
#: Seconds in which an engine must answer that it is there.
ANSWER = 5
HOW_TO_GET_ONE = "On Debian run `sudo infra/sandbox/engine.sh`; elsewhere install Docker 20.10 or newer and start it."

#: What a call to the engine may raise; never the fault of a job.
FAULTS = (docker.errors.DockerException, requests.RequestException, OSError)

_local = threading.local()


def client() -> docker.APIClient:
    """This thread's client of the engine that DOCKER_HOST names, or the local one.

    Raises:
        ServiceError: no engine answers.
    """
    made: docker.APIClient | None = getattr(_local, "client", None)
    if made is None:
        try:
            made = docker.from_env(timeout=ANSWER).api
            _ping(made)
        except FAULTS as error:
            raise _no_answer(error) from error
        made.timeout = PATIENCE
        _local.client = made
    return made


def _ping(api: docker.APIClient) -> None:
    """Whether the engine is there, which it must say soon."""
    before, api.timeout = api.timeout, ANSWER
    try:
        api.ping()
    finally:
        api.timeout = before


def _no_answer(error: Exception) -> ServiceError:
    """Gone, silent, or not for us: each with its own way out."""
    text = " ".join(str(error).split())[:200]
    if "Permission denied" in text:
        return ServiceError(
            f"this user may not speak to the Docker engine ({text})",
            "Add the user to the group docker and log in again, or run as root.",
        )
    if "timed out" in text:
        return ServiceError(f"the Docker engine is silent for {ANSWER} s ({text})", "Restart it, then try again.")
    return ServiceError(f"no Docker engine answers ({text})", HOW_TO_GET_ONE)


def missing() -> ServiceError | None:
    """Why no engine can be used at this moment, and how to get one; None if one answers."""
    try:
        _ping(client())
    except ServiceError as error:
        return error
    except FAULTS as error:  # it answered this process before
        return _no_answer(error)
    return None


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn faults of the engine into one line.

    Raises:
        ServiceError: the engine failed at `doing`.
    """
    try:
        yield
    except FAULTS as error:
        raise ServiceError(f"the Docker engine failed at {doing}: {error}", "See `m1 sandbox check`.") from error


def describe() -> dict[str, Any]:
    """Version, storage driver, cgroup version, runtimes, default runtime and security options of the engine."""
    with explained("telling about itself"):
        info = client().info()
        version = client().version()
    return {
        "version": version["Version"],
        "api": version["ApiVersion"],
        "storage": info.get("Driver", "?"),
        "cgroup": info.get("CgroupVersion", "1"),
        "runtimes": sorted(info.get("Runtimes") or {}),
        "default_runtime": info.get("DefaultRuntime", "?"),
        "security": info.get("SecurityOptions") or [],
        "limits": {name: bool(info.get(key)) for name, key in _LIMITS.items()},
    }


_LIMITS = {"memory": "MemoryLimit", "swap": "SwapLimit", "pids": "PidsLimit", "cpu": "CpuCfsQuota"}


def owner() -> str:
    """Identity of this process, as containers carry it."""
    return f"{socket.gethostname()}:{os.getpid()}:{start_mark(os.getpid())}"


def reap() -> int:
    """Remove containers whose runner on this host is dead; their number."""
    count = 0
    with explained("listing containers"):
        found = client().containers(all=True, filters={"label": OWNER})
    for container in found:
        if not _alive(container["Labels"][OWNER]):
            remove(container["Id"])
            count += 1
    return count


def remove(container: str) -> None:
    """Kill the container with all its processes and remove it; nothing happens when it is gone already.

    Raises:
        ServiceError: the engine could not do it.
    """
    try:
        client().remove_container(container, force=True, v=True)
    except docker.errors.NotFound:
        return
    except docker.errors.APIError as error:
        if error.status_code == 409:  # being removed at this moment
            return
        raise ServiceError(f"container {container[:12]} cannot be removed: {error}", "See `docker ps`.") from error
    except FAULTS as error:
        raise ServiceError(f"container {container[:12]} cannot be removed: {error}", HOW_TO_GET_ONE) from error


def _alive(identity: str) -> bool:
    """Whether the process still runs; one of another host is believed to."""
    host, pid, started = identity.split(":", 2)
    if host != socket.gethostname():
        return True
    try:
        return start_mark(int(pid)) == started
    except (psutil.Error, ValueError):
        return False
