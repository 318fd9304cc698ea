"""Several pytest runs in one container: pytest is imported once, and every run is a fork of that process.

Runs inside the sandbox and imports nothing of this project. It reads `m1_batch.json`, a list of runs, each with

- `changed`: by path, the number of the file below `m1_changed` that takes its place in the tree; null removes it,
- `asked`: what `m1_probe.py` reads, `arguments`: of pytest, `path`: folders of the tree for the import path,
- `seconds`: limit of the run.

Each run has a fresh copy of the tree `m1_base`, which it cannot write into, as where answers are judged; all that it
started is killed at its end. What the probe found is
`m1_result_<number>.json`; for a run that ended without it, how it ended and the end of its output. Compiled files of
what is the same in all trees are shared, as are those that the image has; a changed file has a time of its own, so that
none made of another is taken.
"""

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import sys
import time

import _pytest.config
import pytest

HERE = os.getcwd()
COMPILED = os.path.join(HERE, "m1_compiled")
TREE = os.path.join(HERE, "m1_tree")
OUTPUT = os.path.join(HERE, "m1_output")
#: What the probe is to do, and what it has found.
PROBE, FOUND = os.path.join(HERE, "m1_probe.json"), os.path.join(HERE, "m1_found.json")


def lay(number, changed):
    """The tree of a run, as it is before any test ran in it, and nothing found yet."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(FOUND)
    if os.path.isdir(TREE):
        writable(TREE, True)
        shutil.rmtree(TREE)
    shutil.copytree("m1_base", TREE)
    for path, place in changed.items():
        target = os.path.join(TREE, path)
        if place is None:
            os.remove(target)
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy(os.path.join("m1_changed", str(place)), target)
        moment = os.stat("m1_batch.json").st_mtime + 10 * (number + 1)
        os.utime(target, (moment, moment))
    writable(TREE, False)


def writable(folder, can):
    """Whether anything can be made, changed or removed below `folder`."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if not os.path.islink(path):
                mode = os.stat(path).st_mode & 0o777
                os.chmod(path, mode | 0o200 if can else mode & 0o555)
    os.chmod(folder, 0o755 if can else 0o555)


def become(run):
    """The process of a run, from the fork on; does not return."""
    code = 70
    try:
        os.setsid()
        output = os.open(OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(TREE)
        with open(PROBE, "w", encoding="utf-8") as file:
            json.dump(run["asked"], file)
        folders = [os.path.normpath(os.path.join(TREE, folder)) for folder in run["path"]]
        sys.path[:] = [TREE, *folders, *sys.path[1:], HERE]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)
        sys.dont_write_bytecode = False
        sys.pycache_prefix = COMPILED
        sys.argv[:] = ["pytest", *run["arguments"]]
        code = int(pytest.main(run["arguments"]))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def share_compiled():
    """What the image has compiled is found below the prefix of the runs, too."""
    os.mkdir(COMPILED)
    images = sys.pycache_prefix
    for name in os.listdir(images) if images and os.path.isdir(images) else ():
        os.symlink(os.path.join(images, name), os.path.join(COMPILED, name))


def wait(process, seconds):
    """Its status, or None if it was killed because its time was over."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def children():
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="utf-8") as file:
        return [int(number) for number in file.read().split()]


def sweep():
    """Kill what a run has left behind: it is ours, since orphans come to this process."""
    while left := children():
        for process in left:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def main():
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    for name in _pytest.config.builtin_plugins:
        if name != "pytester":
            __import__(f"_pytest.{name}")
    with open("m1_batch.json", encoding="utf-8") as file:
        runs = json.load(file)
    share_compiled()
    gc.freeze()  # what is here before the forks is never looked through again by any of them
    for number, run in enumerate(runs):
        lay(number, run["changed"])
        process = os.fork()
        if process == 0:
            become(run)
        status = wait(process, run["seconds"])
        sweep()
        result = f"m1_result_{number}.json"
        if os.path.isfile(FOUND) and status is not None:
            os.replace(FOUND, result)
            continue
        with open(OUTPUT, "rb") as file:
            file.seek(max(0, os.path.getsize(OUTPUT) - 2000))
            tail = file.read().decode(errors="replace")
        killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with open(result, "w", encoding="utf-8") as file:
            json.dump({"ended": "timeout" if status is None else "memory" if killed else "crash", "output": tail}, file)


main()
