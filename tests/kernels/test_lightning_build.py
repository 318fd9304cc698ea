"""Building the compiled kernel: two processes at once, no compiler, a broken compiler, switched off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import build

ROOT = Path(__file__).parents[2]
# Prints whether the compiled kernel is in use and its error against the plain torch form, on poisoned memory.
PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
sys.path.insert(0, "tests/kernels")
from kernels import build
from lightning_cases import make_inputs, run, worst_error
torch.set_num_threads(1)
errors = []
for dim, offsets in ((16, None), (20, [0, 1, 40, 75])):
    inputs = make_inputs(75, dim=dim, offsets=offsets)
    errors += [worst_error(x, y) for x, y in zip(run(inputs, "cpu"), run(inputs, "torch"))]
print("compiled" if build.load() else "plain", max(errors) if all(e == e for e in errors) else "nan")
"""


def start(cache: Path, **environment: str) -> subprocess.Popen:
    # MALLOC_PERTURB_ fills memory with junk (about -1e38 as a float) when it is handed out.
    known = {"M1_KERNELS_CACHE": str(cache), "MALLOC_PERTURB_": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | known | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, float, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    kind, error = out.split()
    return kind, float(error), err


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    if build.load() is None:
        pytest.skip("no compiled kernel on this machine (no C++ compiler)")
    for process in [start(tmp_path) for _ in range(2)]:
        kind, error, _ = finish(process)
        assert kind == "compiled"
        assert error < 1e-6
    names = [path.name for path in (tmp_path / "m1-kernels").iterdir()]
    assert len(names) == 1 and names[0].endswith(".so")


@pytest.mark.parametrize("compiler", ["/nowhere/g++", "false"])
def test_without_a_working_compiler_torch_operations_take_over(tmp_path, compiler):
    kind, error, log = finish(start(tmp_path, CXX=compiler))
    assert kind == "plain"
    assert error == 0.0
    assert "no compiled lightning kernel" in log
    assert not list((tmp_path / "m1-kernels").glob("*")) if (tmp_path / "m1-kernels").exists() else True


def test_compiled_kernel_can_be_switched_off(tmp_path):
    kind, _, log = finish(start(tmp_path, M1_KERNELS_NATIVE="0"))
    assert kind == "plain"
    assert "M1_KERNELS_NATIVE=0" in log
