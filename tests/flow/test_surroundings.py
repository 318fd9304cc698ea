"""What a machine, a hook or an outer job may do to us: no git, another repository, other ranks, an unknown name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scratch
from test_plan import make_data

from m1.environment import forget_outer_run
from m1.files import remove
from m1.run.contract import load_result, newest_run
from m1.tracking import records

OUTER = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1"}
OUTER |= {"TORCHELASTIC_RUN_ID": "another", "PET_NPROC_PER_NODE": "8"}


def run(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**scratch.environment(), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_an_archive_without_git_works(checkout: Path) -> None:
    remove(checkout / ".git")
    assert records.git_revision() == records.Revision("none", False)
    for command in (["plan", "--profile", "scratch"], ["data", "--profile", "scratch"]):
        done = scratch.m1(checkout, *command)
        assert "corpus" in done.stdout and done.stderr == ""
    checked = scratch.m1(checkout, "check", check=False)
    assert "no commit of git is known here" in " ".join(checked.stdout.split())
    done = run(checkout, sys.executable, "-c", "from m1.data import dvc; print(dvc.status(['corpus@tiny']))")
    assert done.returncode == 0, done.stderr


def test_a_checkout_that_cannot_be_written_is_found_by_the_check(checkout: Path) -> None:
    """As another user than its owner; root may write anywhere."""
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    checkout.chmod(0o555)
    checked = scratch.m1(checkout, "check", check=False)
    checkout.chmod(0o755)
    assert checked.returncode == 1 and "not writable" in checked.stdout


@pytest.fixture
def committed(checkout: Path) -> str:
    """The commit of the checkout."""
    scratch.shell("git add -A; git -c user.name=a -c user.email=a@b commit -qm one", checkout)
    return scratch.run(["git", "rev-parse", "HEAD"], checkout).stdout.strip()


def test_the_repository_of_a_hook_is_not_ours(
    checkout: Path, committed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    scratch.run(["git", "init", "-q", str(other)], tmp_path)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    forget_outer_run()
    assert records.git_revision() == records.Revision(committed, False)
    assert "GIT_DIR" not in os.environ


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_checkout_of_another_user_has_its_commit(checkout: Path, committed: str) -> None:
    for path in (checkout, checkout / ".git"):
        os.chown(path, 12345, 12345)
    assert records.git_revision().commit == committed


@pytest.mark.parametrize("stage", ["pretrain", "export"])
def test_ranks_of_an_outer_job_are_not_ours(checkout: Path, stage: str) -> None:
    make_data(checkout)
    done = run(checkout, sys.executable, "-m", "stages.pretrain", "--profile", "scratch", **OUTER)
    assert done.returncode == 0, done.stderr
    for above in ("sft", "context-extension", "rl-40k", "rl-80k", "evaluate", "export"):
        if stage == "export":
            module = f"stages.{'rl' if above.startswith('rl') else above.replace('-', '_')}"
            done = run(checkout, sys.executable, "-m", module, "--profile", "scratch", "--stage", above, **OUTER)
            assert done.returncode == 0, done.stderr
    newest = newest_run("scratch", stage)
    assert newest is not None and load_result(newest) is not None
    log = (newest / "log.txt").read_text()
    assert "rank 0" in log and "rank 3" not in log


def test_a_host_name_that_does_not_resolve(checkout: Path) -> None:
    """The stage's two ranks, and the collectives of a process group among them."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-u", "hostname", "nosuchhost"]).returncode:
        pytest.skip("this user, or this container, may not have another host name")
    make_data(checkout)
    work = checkout / "stages" / "pretrain" / "train.py"
    group = "import torch.distributed as d; d.init_process_group('gloo'); d.barrier(); d.destroy_process_group()"
    work.write_text(work.read_text().replace("    rank = int(", f"    {group}\n    rank = int(", 1))
    assert group in work.read_text()
    command = f"hostname nosuchhost; exec {sys.executable} -m stages.pretrain --profile scratch"
    done = run(checkout, "unshare", "-u", "bash", "-c", command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert newest_run("scratch", "pretrain") is not None
