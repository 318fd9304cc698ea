"""Building the compiled kernel: two processes at once, no compiler, a broken compiler, switched off."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning_cases import make_inputs, run

from kernels import build

ROOT = Path(__file__).parents[2]
# Loads the builder alone: without torch, two processes start close enough together to collide.
BUILD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("build", {str(Path(build.__file__))!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
assert build.load() is not None
"""
COMPARE = """
import sys, torch
sys.path.insert(0, "tests/kernels")
from lightning_cases import assert_close, make_inputs, run
torch.set_num_threads(1)
for dim, offsets in ((16, None), (20, [0, 1, 40, 75])):
    inputs = make_inputs(75, dim=dim, offsets=offsets)
    assert_close(run(inputs, "cpu"), run(inputs, "torch"), 1e-6)
"""

needs_compiler = pytest.mark.skipif(build.load() is None, reason="no compiled kernel here (no C++ compiler)")


def start(program: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=os.environ | environment)


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """The decision which kernel to use is made again inside the test, and again after it."""
    monkeypatch.setenv("M1_KERNELS_CACHE", str(tmp_path))
    build.load.cache_clear()
    yield tmp_path / "m1-kernels"
    build.load.cache_clear()


@needs_compiler
def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    processes = [start(BUILD, M1_KERNELS_CACHE=str(tmp_path)) for _ in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    names = [path.name for path in (tmp_path / "m1-kernels").iterdir()]
    assert len(names) == 1 and names[0].endswith(".so")


@needs_compiler
def test_compiled_kernel_reads_no_memory_it_did_not_write():
    # MALLOC_PERTURB_ fills memory with junk (about -1e38 as a float) when it is handed out.
    assert start(COMPARE, MALLOC_PERTURB_="1", PYTHONPATH=str(ROOT)).wait(timeout=300) == 0


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_without_a_working_compiler_torch_operations_take_over(fresh_build, monkeypatch, caplog, compiler):
    monkeypatch.setenv("CXX", compiler)
    inputs = make_inputs(75)
    with caplog.at_level(logging.WARNING):
        found = run(inputs, "cpu")
    assert all(torch.equal(x, y) for x, y in zip(found, run(inputs, "torch"), strict=True))
    assert [r.message for r in caplog.records if "no compiled kernels" in r.message]
    assert not list(fresh_build.glob("*"))


def test_compiled_kernel_can_be_switched_off(fresh_build, monkeypatch, caplog):
    monkeypatch.setenv("M1_KERNELS_NATIVE", "0")
    with caplog.at_level(logging.INFO):
        assert build.load() is None
    assert "M1_KERNELS_NATIVE=0" in caplog.text
    assert not fresh_build.exists()
