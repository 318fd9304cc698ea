"""First process of the container, under a user of its own that the job cannot signal, trace or read.

Lays in the protected files, tells at the end which limits were met, collects orphans, and ends the container when
the runner is gone. Runs with `wire.py` in front of it.
"""

import os
import signal

WORK = "/work"


def number_after(word, *paths):
    """The number after `word` in the first of these cgroup files that exists (version 1 or 2); 0 without any."""
    for path in paths:
        try:
            with open("/sys/fs/cgroup/" + path, encoding="utf-8") as file:
                for line in file:
                    name, _, value = line.partition(" ")
                    if name == word:
                        return int(value)
        except (OSError, ValueError):
            continue
    return 0


def account():
    volume = os.statvfs(WORK)
    return {
        "memory": number_after("oom_kill", "memory.events", "memory/memory.oom_control"),
        "pids": number_after("max", "pids.events", "pids/pids.events"),
        "full": volume.f_bavail == 0 or volume.f_favail == 0,
    }


def main():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.umask(0)
    while True:
        try:
            head = receive(0)  # noqa: F821
        except EOFError:
            return
        answer = {}
        if head["what"] == "lay":
            try:
                lay(0, head["files"], WORK, 0o755 if head["sealed"] else 0o1777)  # noqa: F821
                if head["sealed"]:  # nothing can be made that would be found before one of these files, or in its place
                    os.chmod(WORK, 0o755)
            except OSError as error:
                answer = {"error": str(error)}
        elif head["what"] == "account":
            answer = account()
        write_all(1, pack(answer))  # noqa: F821


main()
