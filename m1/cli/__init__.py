"""The command line `m1`. Modules that take long to import are imported by the command that needs them."""

from __future__ import annotations

import sys
import time
import traceback


def main() -> None:
    """Entry point: errors become one line on stderr and an exit code, never a traceback."""
    from m1.errors import M1Error
    from m1.streams import make_readable

    make_readable()
    try:
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
