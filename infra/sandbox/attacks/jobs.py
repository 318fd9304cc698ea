"""Programs that attack the host, the limits and the runner from inside a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m1.tasks.sandbox import Kind


@dataclass(frozen=True)
class Program:
    """A Python program and what must become of it.

    Attributes:
        kinds: how it may end.
        output: what it prints where it is contained; None where that does not matter.
    """

    code: str
    kinds: tuple[Kind, ...] = (Kind.OK,)
    output: str | None = None


def _refused(*calls: str) -> Program:
    """Every call of libc must fail; nothing is printed then."""
    tries = "".join(f"    lambda: {call},\n" for call in calls)
    return Program(
        "import ctypes, errno, os, socket\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        f"tries = [\n{tries}]\n"
        "for number, attempt in enumerate(tries):\n"
        "    try: found = attempt()\n"
        "    except OSError: continue\n"
        "    if found != -1: print('DONE', number, found)\n",
        output="",
    )


#: System calls by number, the same on every architecture where they are newer than the common table.
IO_URING_SETUP, IO_URING_ENTER, IO_URING_REGISTER = 425, 426, 427

PROGRAMS: Mapping[str, Program] = {
    "fork bomb": Program(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", (Kind.TIMEOUT, Kind.MEMORY)
    ),
    "thread bomb": Program(
        "import threading\ntry:\n    while True: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "except RuntimeError: import os; os._exit(0)\n",
        (Kind.OK, Kind.MEMORY, Kind.TIMEOUT),
    ),
    "memory bomb": Program("hold = []\nwhile True: hold.append(bytearray(1 << 20))", (Kind.MEMORY,)),
    "memory bomb in shared memory": Program(
        "n = 0\nwhile True:\n    open(f'/dev/shm/{n}', 'wb').write(bytes(1 << 20)); n += 1",
        (Kind.OK, Kind.MEMORY),
    ),
    "disk fill": Program(
        "n = 0\nwhile True:\n    open(f'/work/{n}', 'wb').write(bytes(1 << 20)); n += 1", (Kind.OK, Kind.MEMORY)
    ),
    "folders without end": Program(
        "import os\ntry:\n    for n in range(200_000): os.mkdir('d'); os.chdir('d')\nexcept OSError: print('stopped')",
        (Kind.OK, Kind.MEMORY, Kind.TIMEOUT),
    ),
    "files without end": Program(
        "try:\n    for n in range(200_000): open(f'/work/f{n}', 'w').close()\nexcept OSError: print('stopped')",
        (Kind.OK, Kind.MEMORY, Kind.TIMEOUT),
    ),
    "output without end": Program("while True: print('x' * 1000)", (Kind.OUTPUT_LIMIT,)),
    "loop that ignores signals": Program(
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass\n",
        (Kind.TIMEOUT,),
    ),
    "killing everything": Program("import os\nos.kill(-1, 9)", (Kind.KILLED,)),
    "killing the parent": Program("import os\nos.kill(os.getppid(), 9)", (Kind.KILLED,)),
    "stopping the parent": Program("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)", (Kind.TIMEOUT,)),
    "killing process 1": Program(
        "import os\ntry: os.kill(1, 9); print('DONE')\nexcept PermissionError: pass", output=""
    ),
    "a child that outlives": Program(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(1)\nprint('over')",
        output="over\n",
    ),
    "network": Program(
        "import socket\nfor host in ('192.0.2.1', '172.17.0.1', '10.0.2.2', '169.254.169.254'):\n"
        "    try: socket.create_connection((host, 80), 2); print('DONE')\n    except OSError: pass\n",
        output="",
    ),
    "sockets of other families": Program(
        "import socket\nfor family in (17, 40, 38, 29, 31, 16 + 1, 44, 5, 9, 21, 30):\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        try: socket.socket(family, kind).close(); print('DONE', family, kind)\n        except OSError: pass\n",
        output="",
    ),
    "io_uring": _refused(
        f"libc.syscall({IO_URING_SETUP}, 8, ctypes.create_string_buffer(256))",
        f"libc.syscall({IO_URING_ENTER}, 0, 0, 0, 0, None, 0)",
        f"libc.syscall({IO_URING_REGISTER}, 0, 0, None, 0)",
    ),
    "calls into the kernel's depths": _refused(
        *(f"libc.syscall({number}, 0, 0, 0, 0, 0, 0)" for number in (321, 323, 298, 250, 248, 249, 310, 311, 246, 320,
                                                                    175, 313, 176, 169, 167, 304, 303, 212, 279, 256)),
    ),
    "mounts and namespaces": _refused(
        "libc.mount(b'none', b'/work', b'tmpfs', 0, None)", "libc.umount2(b'/proc', 2)", "libc.unshare(0x10000000)",
        "libc.unshare(0x00020000)", "libc.chroot(b'/work')", "libc.syscall(428, -100, b'/', 0)",
        "libc.syscall(430, b'tmpfs', 0)", "libc.setns(os.open('/proc/self/ns/net', 0), 0)",
        "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
    ),
    "another user": _refused("os.setuid(0)", "os.setgid(0)", "libc.setresuid(0, 0, 0)", "libc.capset(None, None)"),
    "tracing the runner": Program(
        "import ctypes, os\nlibc = ctypes.CDLL(None)\nfor pid in (os.getppid(), 1):\n"
        "    if libc.ptrace(16, pid, None, None) == 0: print('DONE')\n"
        "    for name in ('mem', 'environ', 'maps'):\n"
        "        try: open(f'/proc/{pid}/{name}', 'rb').read(1); print('DONE', name)\n        except OSError: pass\n",
        output="",
    ),
    "files of the host": Program(
        "import os\nfor path in ('/var/run/docker.sock', '/etc/shadow', '/proc/kcore', '/dev/mem', '/dev/sda',\n"
        "             '/dev/kvm', '/proc/sysrq-trigger', '/sys/kernel/security', '/proc/1/root/etc'):\n"
        "    try:\n        found = os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)\n"
        "        print('DONE', path) if found else None\n    except OSError: pass\n",
        output="",
    ),
    "limits changed from inside": Program(
        "paths = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes',\n"
        "         '/sys/fs/cgroup/pids.max', '/proc/sys/kernel/core_pattern', '/proc/1/oom_score_adj',\n"
        "         '/sys/fs/cgroup/cgroup.procs')\nfor path in paths:\n"
        "    try: open(path, 'w').write('1'); print('DONE', path)\n    except OSError: pass\n",
        output="",
    ),
    "records on the runner's line": Program(
        "import os, struct\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, struct.pack('>II', 2, 0) + b'{}'); print('DONE', fd)\n    except OSError: pass\n",
        output="",
    ),
}  # fmt: skip
