"""What goes in comes out, nothing is left for the next job, and failures have the right name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import docker.errors
import pytest
from sandbox_jobs import SMALL, python

from infra.sandbox import Job, Kind, Limits, Sandbox, engine
from infra.sandbox.check import check_sandbox
from m1 import paths
from m1.errors import ServiceError, UsageError


def owned() -> list[dict]:
    found = engine.client().containers(all=True, filters={"label": engine.OWNER})
    return [container for container in found if container["Labels"][engine.OWNER] == engine.owner()]


def test_files_output_and_exit_code_make_the_round_trip(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 5000
    script = "#!/bin/sh\necho out $GREETING; echo err >&2; cat in/data.bin in/data.bin > back.bin; exit 7\n"
    files = {"run.sh": script, "in/data.bin": data, "in/deep/er/empty": b""}
    job = Job(files, ["./run.sh"], SMALL, ("back.bin", "in/deep/er/empty", "none"), {"GREETING": "hello world"})
    result = sandbox.run(job)
    assert result.kind is Kind.OK and result.exit_code == 7, result
    assert result.output == "out hello world\nerr\n" and not result.truncated
    assert result.files == {"back.bin": data + data, "in/deep/er/empty": b""}
    assert "none: No such file" in result.message
    assert 0 < result.seconds < SMALL.seconds


def test_command_that_is_not_there(sandbox: Sandbox) -> None:
    result = sandbox.run(Job({}, ["no-such-program"], SMALL))
    assert (result.kind, result.exit_code) == (Kind.OK, 127) and "no-such-program" in result.output


def test_standard_input_is_empty_and_environment_is_not_ours(sandbox: Sandbox) -> None:
    os.environ["M1_TEST_SECRET"] = "not for the job"
    try:
        result = sandbox.run(python("import os, sys; print(repr(sys.stdin.read()), sorted(os.environ))"))
    finally:
        del os.environ["M1_TEST_SECRET"]
    ours = ["HOME", "LANG", "PATH", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONPYCACHEPREFIX", "TMPDIR"]
    assert result.output == f"'' {ours}\n"


def test_image_holds_compiled_files_that_a_job_cannot_change(sandbox: Sandbox) -> None:
    code = """
import json, os, pytest
for module in (json, pytest):
    print(os.path.isfile(module.__cached__))
    try:
        open(module.__cached__, "ab")
    except OSError as error:
        print(error.strerror)
"""
    result = sandbox.run(python(code))
    assert result.output == "True\nPermission denied\n" * 2


def test_signal_is_told_from_exit(sandbox: Sandbox) -> None:
    result = sandbox.run(python("import os; os.kill(os.getpid(), 11)"))
    assert (result.kind, result.exit_code) == (Kind.KILLED, 139) and "signal 11" in result.message


def test_each_container_serves_one_job(sandbox: Sandbox) -> None:
    code = """
import os, pathlib, socket
for folder in ("/work", "/tmp", "/dev/shm"):
    print(sorted(set(os.listdir(folder)) - {"job.py"}))
    pathlib.Path(folder, "left").write_text("for the next one")
print(socket.gethostname())
"""
    results = sandbox.run_many([python(code) for _ in range(4)], workers=2)
    assert [result.kind for result in results] == [Kind.OK] * 4
    lines = [result.output.splitlines() for result in results]
    assert all(line[:3] == ["[]", "[]", "[]"] for line in lines)
    assert len({line[3] for line in lines}) == 4


def test_results_are_in_the_order_of_the_jobs(sandbox: Sandbox) -> None:
    jobs = [python(f"import time; time.sleep({0.3 * (3 - n)}); print({n})") for n in range(4)]
    assert [result.output for result in sandbox.run_many(jobs, workers=4)] == [f"{n}\n" for n in range(4)]


def test_limits_belong_to_the_job(sandbox: Sandbox) -> None:
    code = "import os; v = os.statvfs('/work'); print(v.f_blocks * v.f_frsize >> 20)"
    wide = replace(SMALL, work_mb=24)
    assert [sandbox.run(python(code, limits=limits)).output for limits in (SMALL, wide, SMALL)] == [
        "16\n",
        "24\n",
        "16\n",
    ]


def test_the_cage_is_shut_as_seen_from_inside_and_from_the_engine(image: str, sandbox: Sandbox) -> None:
    rows, good = check_sandbox(image)
    assert good, rows
    waiting = threading.Thread(target=sandbox.run, args=(python("import time; time.sleep(2)"),))
    waiting.start()
    host = engine.client().inspect_container(owned()[0]["Id"])["HostConfig"]
    waiting.join()
    assert host["NetworkMode"] == "none" and host["ReadonlyRootfs"] and not host["Privileged"]
    assert host["CapDrop"] == ["ALL"] and not host["CapAdd"] and not host["Binds"] and not host["Devices"]
    assert host["Memory"] == host["MemorySwap"] == SMALL.memory_mb * 2**20 and host["PidsLimit"] == SMALL.pids
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
    assert host["CpuQuota"] == host["CpuPeriod"]


@pytest.mark.parametrize(
    "path", ["/etc/x", "../x", "a/../../x", "a//b", "./a", "", "a/", "nul\0", "a/./b", "x" * 2000, "\ud800"]
)
def test_paths_out_of_the_work_area_are_refused(path: str) -> None:
    with pytest.raises(UsageError, match="sandbox path"):
        Job({path: b""}, ["true"])
    with pytest.raises(UsageError, match="sandbox path"):
        Job({}, ["true"], read_back=(path,))


def test_bad_jobs_are_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="is a file too"):
        Job({"a": b"", "a/b": b""}, ["true"])
    with pytest.raises(UsageError, match="not among the files"):
        Job({}, ["true"], protected=("a",))
    with pytest.raises(UsageError, match="not a command"):
        Job({}, [])
    with pytest.raises(UsageError, match="do not fit"):
        Job({"a": bytes(2**20 + 1)}, ["true"], Limits(work_mb=1))
    with pytest.raises(UsageError, match="memory_mb"):
        Limits(memory_mb=1)


def test_image_and_runtime_are_checked_first(image: str) -> None:
    with pytest.raises(ServiceError, match="m1 sandbox build"):
        Sandbox("m1-no-such-image")
    with pytest.raises(ServiceError, match="no runtime 'warp'"):
        Sandbox(image, runtime="warp")


def test_runtime_is_selectable(image: str) -> None:
    with Sandbox(image, runtime="runc", warm=0) as made:
        assert made.run(python("print(1)")).output == "1\n"


def test_container_that_dies_from_outside_is_nobodys_wrong_answer(image: str) -> None:
    done = threading.Event()

    def kill_all() -> None:
        while not done.wait(0.2):
            for container in engine.client().containers(filters={"label": engine.OWNER}):
                with contextlib.suppress(docker.errors.APIError):  # gone, or not started yet
                    inside = engine.client().top(container["Id"])["Processes"]
                    if container["Labels"][engine.OWNER] == engine.owner() and "job.py" in str(inside):
                        engine.client().kill(container["Id"])

    killer = threading.Thread(target=kill_all)
    with Sandbox(image, warm=0) as made:
        killer.start()
        try:
            result = made.run(python("import time; time.sleep(60)", limits=replace(SMALL, memory_mb=130, seconds=90)))
        finally:
            done.set()
            killer.join()
    assert result.kind is Kind.INFRASTRUCTURE and result.exit_code is None, result


def test_containers_go_with_their_runner(image: str) -> None:
    """At the end of the program without a word, and after SIGKILL at the latest with the next start."""
    code = "import sys, time; from infra.sandbox import Sandbox, engine; s = Sandbox(sys.argv[1], warm=1)\n"
    code += "while not s._pool._ready: time.sleep(0.05)\n"
    code += "print(engine.owner(), flush=True)\nif len(sys.argv) > 2: time.sleep(600)"

    def left(owner: str) -> list[dict]:
        found = engine.client().containers(all=True, filters={"label": f"{engine.OWNER}={owner}"})
        return found

    quiet = subprocess.run([sys.executable, "-c", code, image], capture_output=True, text=True, cwd=paths.ROOT)
    assert quiet.returncode == 0, quiet.stderr
    assert left(quiet.stdout.strip()) == []

    killed = subprocess.Popen(
        [sys.executable, "-c", code, image, "wait"], stdout=subprocess.PIPE, text=True, cwd=paths.ROOT
    )
    assert killed.stdout is not None
    owner = killed.stdout.readline().strip()
    assert len(left(owner)) == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    # Nothing of it runs on by itself, ...
    deadline = time.monotonic() + 60
    while any(container["State"] == "running" for container in left(owner)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(container["State"] != "running" for container in left(owner))
    # ... and the next start removes the rest.
    Sandbox(image, warm=0).close()
    assert left(owner) == []


def test_close_leaves_nothing(image: str) -> None:
    before = {container["Id"] for container in owned()}
    with Sandbox(image, warm=2) as made:
        made.run(python("print(1)"))
    assert {container["Id"] for container in owned()} <= before
    with pytest.raises(UsageError, match="closed"):
        made.run(python("print(1)"))


def test_without_an_engine_commands_say_so_and_how_to_get_one() -> None:
    environment = {**os.environ, "DOCKER_HOST": "unix:///nonexistent/docker.sock"}
    command = [sys.executable, "-m", "m1", "sandbox", "images"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, env=environment)
    assert done.returncode == ServiceError.exit_code
    assert "no Docker engine answers" in done.stderr and "engine.sh" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_sealed_job_can_change_and_make_nothing_in_its_work_area(sandbox: Sandbox) -> None:
    code = """
import os
def attempt(what, *arguments):
    try:
        what(*arguments); print("DONE", what.__name__, arguments)
    except OSError: pass
for path in ("job.py", "new", "in/new", "in/data", "in/deep/new"):
    attempt(open, path, "w")
for call in ((os.mkdir, "d"), (os.mkdir, "in/d"), (os.unlink, "in/data"), (os.rename, "in", "out"),
             (os.chmod, "in", 0o777), (os.chmod, "/work", 0o777), (os.symlink, "/etc", "in/link"),
             (os.link, "in/data", "/work/hard")):
    attempt(*call)
open("/tmp/mine", "w").close()
print(open("in/data").read())
"""
    files = {"job.py": code, "in/data": "given", "in/deep/data": ""}
    assert sandbox.run(Job(files, ["python3", "job.py"], SMALL, sealed=True)).output == "given\n"


def test_files_that_cannot_be_laid_out_are_refused_and_not_the_engines_fault(sandbox: Sandbox) -> None:
    many = {f"{n}/{'/'.join('abcdefgh' * 7)}/{n}": b"" for n in range(1200)}
    result = sandbox.run(Job(many, ["true"], SMALL))
    assert result.kind is Kind.REFUSED and "cannot be laid out" in result.message, result
    for path in ("x" * 256, "ä" * 128, "/".join("a" * 65)):
        with pytest.raises(UsageError, match="sandbox path"):
            Job({path: b""}, ["true"])


def test_hidden_modules_work_and_cannot_be_read(sandbox: Sandbox) -> None:
    files = {
        "pkg/__init__.py": "from pkg.inner import f\n",
        "src/pkg2.py": "import pkg\nvalue = pkg.f()\n",
        "pkg/inner.py": """
import os
DATA = os.path.join(os.path.dirname(__file__), "d.txt")
def f():
    'Doc.'
    return open(DATA).read()
""",
        "pkg/d.txt": "data",
        "test_x.py": """
import inspect, os, pytest
import pkg, pkg2
def test_works(): assert pkg2.value == pkg.f() == 'data' and pkg.f.__doc__ == 'Doc.'
def test_read():
    with pytest.raises(OSError): inspect.getsource(pkg.f)
    with pytest.raises(OSError): open(pkg.__file__)
def test_missing():
    with pytest.raises(ImportError): import pkg.other
""",
    }
    hidden = ["pkg/__init__.py", "pkg/inner.py", "src/pkg2.py"]
    report = sandbox.run_tests(files, ["test_x.py"], SMALL, hidden)
    assert set(report.outcomes.values()) == {"passed"} and len(report.outcomes) == 3, report
    broken = sandbox.run_tests({**files, "pkg/inner.py": "def (:\n"}, ["test_x.py"], SMALL, hidden)
    assert set(broken.outcomes.values()) == {"error"} and not broken.tampered
