"""Attacks on the host, the limits and the runner: each is contained and called what it is, and the next job is well.

Attacks on the outcome of a test run are in test_forgery.py.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import docker.errors
import pytest
from sandbox_jobs import SMALL, python

from infra.sandbox import Job, Kind, Sandbox, engine

ENDLESS = replace(SMALL, seconds=4.0)


@pytest.fixture(autouse=True)
def next_job_is_well(sandbox: Sandbox) -> Iterator[None]:
    yield
    after = sandbox.run(python("print(6 * 7)"))
    assert (after.kind, after.exit_code, after.output, after.message) == (Kind.OK, 0, "42\n", "")


def running(word: str) -> list[str]:
    """Processes of this machine whose command line has `word`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if word in command and int(folder.name) != os.getpid():
                found.append(command)
    return found


def test_fork_bomb(sandbox: Sandbox) -> None:
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    result = sandbox.run(Job({"fork_bomb_m1.py": code}, ["python3", "fork_bomb_m1.py"], ENDLESS))
    assert result.kind is Kind.TIMEOUT and result.exit_code is None
    assert running("fork_bomb_m1.py") == []


def test_process_limit_is_named(sandbox: Sandbox) -> None:
    code = "import subprocess\nfor _ in range(100): subprocess.Popen(['sleep', '100'])"
    result = sandbox.run(python(code))
    assert result.kind is Kind.OK and result.exit_code == 1
    assert "BlockingIOError" in result.output and "limit of 32 processes" in result.message


def test_memory_bomb(sandbox: Sandbox) -> None:
    result = sandbox.run(python("hold = []\nwhile True: hold.append(bytearray(1 << 20))"))
    assert result.kind is Kind.MEMORY and "128 MiB" in result.message


def test_memory_bomb_of_many_processes_that_claim_importance(sandbox: Sandbox) -> None:
    code = """
import os
for _ in range(24):
    if os.fork() == 0:
        try:
            open("/proc/self/oom_score_adj", "w").write("0")
        except OSError:
            pass
        hold = [bytearray(1 << 20) for _ in range(12)]
        os.read(os.pipe()[0], 1)
os.wait()
"""
    assert sandbox.run(python(code)).kind is Kind.MEMORY


def test_disk_fill(sandbox: Sandbox) -> None:
    code = "n = 0\nwhile True:\n    open(f'/work/{n}', 'wb').write(bytes(1 << 20)); n += 1"
    result = sandbox.run(python(code))
    assert result.kind is Kind.OK and result.exit_code == 1 and "No space left" in result.output
    assert "work area of 16 MiB is full" in result.message


def test_one_large_file(sandbox: Sandbox) -> None:
    code = "f = open('/work/big', 'wb')\nfor _ in range(8): f.write(bytes(1 << 20)); f.flush()"
    result = sandbox.run(python(code))
    assert result.exit_code == 1 and "File too large" in result.output


def test_endless_output(sandbox: Sandbox) -> None:
    result = sandbox.run(python("while True: print('x' * 1000)"))
    assert result.kind is Kind.OUTPUT_LIMIT and result.truncated
    assert len(result.output) == SMALL.output_kb * 1024 and set(result.output) == {"x", "\n"}


def test_output_after_the_end_is_cut_off(sandbox: Sandbox) -> None:
    """A grandchild in a session of its own neither holds the result up nor adds to it."""
    code = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    while True:
        time.sleep(0.2); os.write(1, b"still here\\n")
time.sleep(1); print("done")
"""
    result = sandbox.run(python(code))
    assert result.kind is Kind.OK and result.exit_code == 0 and "done\n" in result.output
    assert result.output.count("still here") < 30 and result.seconds < 30


def test_endless_loop_that_ignores_term(sandbox: Sandbox) -> None:
    code = """
import os, signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
os.setsid() if os.fork() == 0 else None
while True: pass
"""
    result = sandbox.run(Job({"deaf_m1.py": code}, ["python3", "deaf_m1.py"], ENDLESS))
    assert result.kind is Kind.TIMEOUT and result.exit_code is None and "4 s" in result.message
    assert ENDLESS.seconds <= result.seconds
    assert running("deaf_m1.py") == []


def test_network(sandbox: Sandbox) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        code = f"""
import socket
for address in (("127.0.0.1", {listener.getsockname()[1]}), ("172.17.0.1", 80), ("192.0.2.1", 80), ("10.0.2.2", 53)):
    try:
        socket.create_connection(address, timeout=2); print("connected", address)
    except OSError as error:
        print("no", address[0])
try:
    socket.getaddrinfo("deb.debian.org", 80); print("resolved")
except OSError: print("no name")
print([name for _, name in socket.if_nameindex()])
try:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print("raw socket")
except PermissionError: print("no raw socket")
"""
        result = sandbox.run(python(code))
    no = "".join(f"no {address}\n" for address in ("127.0.0.1", "172.17.0.1", "192.0.2.1", "10.0.2.2"))
    assert result.output == f"{no}no name\n['lo']\nno raw socket\n"


def test_host_files_are_not_there(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's own")
    secret.chmod(0o644)
    code = f"""
import os
for path in ("{secret}", "/var/run/docker.sock", "/root/.ssh", "/home", "/etc/shadow", "/proc/1/environ", "/proc/1/mem",
             "/proc/1/root/etc", "/proc/kcore", "/dev/mem", "/dev/vda", "/dev/sda", "/sys/kernel/debug/x"):
    try:
        found = os.listdir(path) if os.path.isdir(path) else [open(path, "rb").read(9)]
        print("FOUND", path, found) if found else None
    except OSError: pass
print(sum(name.isdigit() for name in os.listdir("/proc")) < 6)
"""
    result = sandbox.run(python(code))
    assert result.output == "True\n", result


def test_writing_outside_the_work_area(sandbox: Sandbox) -> None:
    code = """
import os
memory = ("/dev/shm", "/dev/mqueue")  # the container's own, bounded, gone with it
for folder, _, files in os.walk("/"):
    if folder.startswith(("/proc", "/sys")) or folder.split("/")[1] in ("work", "tmp") or folder in memory:
        continue
    for path in (folder + "/new", *(folder + "/" + name for name in files[:3])):
        if path.startswith("/dev/") and not path.endswith("new"): continue
        try:
            open(path, "ab").close(); print("WROTE", path)
        except OSError: pass
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/cgroup.procs",
             "/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max", "/proc/1/oom_score_adj"):
    try:
        open(path, "w").write("1"); print("WROTE", path)
    except OSError: pass
print("done")
"""
    assert sandbox.run(python(code)).output == "done\n"


def test_links_are_not_followed_when_files_are_read_back(sandbox: Sandbox) -> None:
    code = """
import os
os.symlink("/etc/passwd", "/work/link")
os.symlink("/etc", "/work/folder")
os.symlink("job.py", "/work/inner")
os.mkfifo("/work/pipe")
os.mkdir("/work/directory")
os.truncate(os.open("/work/sparse", os.O_CREAT | os.O_WRONLY), 4 << 20)
open("/work/good", "w").write("mine")
open("/work/private", "w").write("mine too"); os.chmod("/work/private", 0o600)
"""
    names = ("link", "folder/passwd", "inner", "pipe", "directory", "good", "private", "sparse")
    result = sandbox.run(python(code, read_back=names))
    assert result.kind is Kind.OK, result
    assert result.files == {"good": b"mine", "private": b"mine too", "sparse": bytes(4 << 20)}
    for name in ("link", "folder/passwd", "inner", "pipe", "directory"):
        assert f"{name}: " in result.message


def test_protected_files_stay_as_they_are(sandbox: Sandbox) -> None:
    code = """
import os, shutil
def attempt(what, *arguments):
    try:
        what(*arguments); print("DONE", what.__name__, arguments)
    except OSError: pass
attempt(open, "tests/test_a.py", "w")
attempt(os.unlink, "tests/test_a.py")
attempt(os.rename, "tests/test_a.py", "tests/other")
attempt(os.chmod, "tests/test_a.py", 0o777)
attempt(os.rename, "tests", "moved")
attempt(shutil.move, "/work/tests", "/tmp/tests")
attempt(os.rmdir, "tests")
open("tests/new.py", "w").write("allowed")
open("replaced", "w").write("x"); attempt(os.replace, "replaced", "tests/test_a.py")
attempt(os.link, "tests/test_a.py", "hard")
open("own.py", "a").write("changed")
print("over")
"""
    files = {"tests/test_a.py": "original", "own.py": "own "}
    job = python(code, files=files, protected=("tests/test_a.py",), read_back=("tests/test_a.py", "own.py"))
    result = sandbox.run(job)
    assert result.output == "over\n", result
    assert result.files == {"tests/test_a.py": b"original", "own.py": b"own changed"}


def test_setuid(sandbox: Sandbox) -> None:
    code = """
import ctypes, os, shutil, subprocess
for call in (os.setuid, os.setgid, os.seteuid):
    try:
        call(0); print("became root")
    except PermissionError: pass
for folder in ("/work", "/tmp"):
    shutil.copy("/bin/cat", folder + "/mine"); os.chmod(folder + "/mine", 0o6755)
    status = subprocess.run([folder + "/mine", "/proc/self/status"], capture_output=True, text=True).stdout
    print(*[line.split() for line in status.splitlines() if line.startswith(("Uid", "CapEff", "CapBnd", "NoNewPrivs"))])
for root, _, names in os.walk("/"):
    for name in names:
        path = os.path.join(root, name)
        skipped = root.startswith(("/proc", "/sys", "/work", "/tmp"))
        if not skipped and os.path.isfile(path) and os.lstat(path).st_mode & 0o6000:
            print("setuid file", path)
"""
    lines = sandbox.run(python(code)).output.splitlines()
    none = "0" * 16
    expected = [["Uid:", *["1000"] * 4], ["CapEff:", none], ["CapBnd:", none], ["NoNewPrivs:", "1"]]
    assert lines == [" ".join(map(str, expected))] * 2


def test_mount_and_namespaces(sandbox: Sandbox) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, *arguments):
    print("DONE" if getattr(libc, name)(*arguments) == 0 else "refused", name)
attempt("mount", b"none", b"/work", b"tmpfs", 0, None)
attempt("mount", b"/proc", b"/work", None, 4096, None)
attempt("umount2", b"/proc/kcore", 2)
attempt("unshare", 0x10000000)
attempt("unshare", 0x00020000)
attempt("chroot", b"/work")
attempt("pivot_root", b"/work", b"/work") if hasattr(libc, "pivot_root") else print("refused pivot_root")
"""
    lines = sandbox.run(python(code)).output.splitlines()
    assert len(lines) == 7 and all(line.startswith("refused") for line in lines), lines


def test_ptrace_and_memory_of_the_runner(sandbox: Sandbox) -> None:
    """Neither the process that watches the job nor the keeper can be traced, read or robbed of its descriptors."""
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for pid in (os.getppid(), 1):
    for request in (16, 0x4206):  # PTRACE_ATTACH, PTRACE_SEIZE
        print("DONE" if libc.ptrace(request, pid, None, None) == 0 else "refused")
    for name in ("mem", "environ", "fd", "maps"):
        try:
            path = f"/proc/{pid}/{name}"
            print("DONE", os.listdir(path) if name == "fd" else open(path, "rb").read(1))
        except OSError:
            print("refused")
"""
    assert sandbox.run(python(code)).output == "refused\n" * 12


def test_killing_the_runner(sandbox: Sandbox) -> None:
    code = "import os, signal\ntry: os.kill(1, 9)\nexcept PermissionError: print('keeper lives', flush=True)\n"
    kept = sandbox.run(python(code))
    assert (kept.kind, kept.output) == (Kind.OK, "keeper lives\n")
    for target in ("os.getppid()", "-1"):
        result = sandbox.run(python(f"{code}os.kill({target}, 9)\nprint('exit 0')"))
        assert result.kind is Kind.KILLED and result.exit_code is None, result
        assert "killed the process that watched it" in result.message


def test_stopping_the_runner_is_a_timeout(sandbox: Sandbox) -> None:
    result = sandbox.run(python("import os, signal; os.kill(os.getppid(), signal.SIGSTOP)", limits=ENDLESS))
    assert result.kind is Kind.TIMEOUT


def test_no_container_of_an_attack_is_left(sandbox: Sandbox) -> None:
    """Runs last in this file: all that remains is warm, young and idle."""
    commands: list[str] = []
    deadline = time.monotonic() + 120
    while not commands and time.monotonic() < deadline:
        for container in engine.client().containers(filters={"label": f"{engine.OWNER}={engine.owner()}"}):
            with contextlib.suppress(docker.errors.APIError):  # being removed, or not started yet
                commands.append(str(engine.client().top(container["Id"])["Processes"]))
    assert commands
    assert not [command for command in commands if "job.py" in command or "_m1.py" in command]
