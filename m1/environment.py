"""Environment variables of an outer run that would send ours elsewhere."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

#: What `git rev-parse --local-env-vars` lists: another repository than the one of the working folder.
_GIT: tuple[str, ...] = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_ALTERNATE_OBJECT_DIRECTORIES",
)
_GIT += ("GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX", "GIT_GRAFT_FILE", "GIT_SHALLOW_FILE")
#: What torchrun tells its ranks: a process that is not one of them would take itself for rank 3 of 8.
_TORCHRUN: tuple[str, ...] = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)
_TORCHRUN += ("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_")


def forget_outer_run(environ: MutableMapping[str, str] = os.environ, *, is_rank: bool = False) -> None:
    """Drop what a hook of git, or a job that we were started in, has left in the environment.

    Args:
        is_rank: this process is one of our own ranks, which torchrun tells who it is.
    """
    for name in list(environ):
        of_torchrun = name in _TORCHRUN or name.startswith(_TORCHRUN_PREFIXES)
        if name in _GIT or (of_torchrun and not is_rank):
            del environ[name]
