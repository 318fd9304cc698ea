"""Which checkout the `m1` command works in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from m1 import paths

MAIN = (
    f"import sys; sys.path[0] = {str(paths.ROOT)!r}; sys.argv = ['m1', 'plan', '--help']; import m1.cli; m1.cli.main()"
)


def run_in(folder: Path) -> subprocess.CompletedProcess[str]:
    """`m1 plan --help` of this checkout, in a folder."""
    return subprocess.run([sys.executable, "-c", MAIN], cwd=folder, capture_output=True, text=True)


def test_in_a_copy_of_the_checkout_the_command_of_the_original_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "a copy"
    for file in ("m1/paths.py", "flows/pipeline.py"):
        (copy / file).parent.mkdir(parents=True)
        (copy / file).write_text("")
    for folder in (copy, copy / "m1"):
        done = run_in(folder)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: this `m1` belongs to the checkout {paths.ROOT}")
        assert str(copy) in done.stderr and "make setup" in done.stderr


def test_anywhere_else_it_works(tmp_path: Path) -> None:
    for folder in (tmp_path, paths.ROOT, paths.ROOT / "docs"):
        assert run_in(folder).returncode == 0
