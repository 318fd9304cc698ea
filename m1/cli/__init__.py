"""The command line `m1`. Modules that take long to import are imported by the command that needs them."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code, never a traceback."""
    from m1.environment import forget_outer_run
    from m1.errors import M1Error
    from m1.streams import make_readable

    forget_outer_run()
    make_readable()
    try:
        _refuse_another_checkout()
        from m1.cli.app import app

        app()
        code = 0
    except M1Error as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone
        code = 141
    except Exception as error:
        print(f"error: {type(error).__name__}: {' '.join(str(error).split())} (details: {_keep()})", file=sys.stderr)
        code = 70
    sys.exit(code)


def _refuse_another_checkout() -> None:
    """A copied `.venv` is that of the checkout it was made in: its `m1` would run there, on its data and its runs.

    Raises:
        UsageError: the working folder is in another checkout than the one this command belongs to.
    """
    from m1 import paths
    from m1.errors import UsageError

    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "m1" / "paths.py").is_file() and (folder / "flows" / "pipeline.py").is_file():
            if not folder.samefile(paths.ROOT):
                raise UsageError(
                    f"this `m1` belongs to the checkout {paths.ROOT}, and you are in the checkout {folder}",
                    "Run `make setup` here, which makes an environment of its own, and use .venv/bin/m1.",
                )
            return


def _keep() -> str:
    """File with the traceback of an error nobody foresaw."""
    from m1 import paths

    try:
        folder = paths.STATE / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.write_text(traceback.format_exc(), encoding="utf-8")
        return str(path)
    except OSError:
        return "they could not be written"
