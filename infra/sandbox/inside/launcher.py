"""Starts the job and waits for it, under the job's own user. Runs with `wire.py` in front of it.

Standard output is the job's. Standard error is the line to the runner: the job does not have it, and cannot take it
from here, since this process is not dumpable (no ptrace, no /proc/<pid>/fd or mem for others of the same user). The
job can kill this process; the runner then sees that there is no record of an end.

Arguments: source of the test run (`tests.py`), and whether pytest is to be imported before a job comes.
"""

import contextlib
import ctypes
import os
import signal
import stat
import sys
import types

WORK = "/work"


def guard():
    # When memory runs out, the job's side goes first; must come before PR_SET_DUMPABLE, which closes the file to us.
    with open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("500")
    pr_set_dumpable = 4
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_dumpable, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE)")


def load_tests():
    module = types.ModuleType("m1_tests")
    exec(compile(sys.argv[1], "<m1 tests>", "exec"), module.__dict__)
    module.load()
    return module


def read_back(paths, most):
    """Contents of regular files, by descriptors from folder to folder, so that no symlink is followed."""
    found, unread, left = [], {}, most * 4
    for path in paths:
        opened = [os.open(WORK, os.O_RDONLY | os.O_DIRECTORY)]
        try:
            *folders, name = path.split("/")
            for part in folders:
                opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            opened.append(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=opened[-1]))
            state = os.fstat(opened[-1])
            if not stat.S_ISREG(state.st_mode):
                unread[path] = "not a regular file"
            elif state.st_size > min(most, left):
                unread[path] = "too large"
            else:
                content = read_exactly(opened[-1], state.st_size)  # noqa: F821
                left -= len(content)
                found.append((path, content))
        except (OSError, EOFError) as error:
            unread[path] = getattr(error, "strerror", None) or "changed while it was read"
        finally:
            for fd in opened:
                os.close(fd)
    return found, unread


def become(head, control, tests):
    """The job's process, from the fork on; does not return."""
    code = 70
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.umask(0o022)
        os.chdir(WORK)
        if head["tests"] is None:
            os.close(control)
            os.execvpe(head["command"][0], head["command"], head["environment"])
        os.environ.clear()
        os.environ.update(head["environment"])
        code = (tests or load_tests()).run(head.pop("tests"), control)
    except OSError as error:
        os.write(2, f"{head['command'][0]}: {error.strerror}\n".encode(errors="replace"))
        code = 127
    finally:
        os._exit(code)


def main():
    guard()
    control = os.dup(2)
    os.set_inheritable(control, False)
    tests = load_tests() if sys.argv[2] == "1" else None
    while (head := receive(0))["what"] == "ping":  # noqa: F821
        write_all(control, pack({}))  # noqa: F821
    try:
        lay(0, head["files"], WORK, 0o755)  # noqa: F821
    except OSError as error:
        write_all(control, pack({"error": str(error)}))  # noqa: F821
        return
    write_all(control, pack({"laid": True}))  # noqa: F821
    child = os.fork()
    if child == 0:
        become(head, control, tests)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # What the job has left behind writes no more, neither into the output nor into the files.
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    found, unread = read_back(head["read_back"], head["most"])
    sizes = [(path, len(content)) for path, content in found]
    payload = b"".join(content for _, content in found)
    write_all(control, pack({"exit": code, "files": sizes, "unread": unread}, payload))  # noqa: F821


main()
