"""Run a script, and fail if a thread of gloo is alive when the interpreter shuts down.

    python tests/helpers/shutdown.py SCRIPT ARGUMENTS

Such a thread aborts the process if it frees a tensor then, which is rare on idle cores and common on busy ones. See
`common.errors.leave`.
"""

import atexit
import os
import runpy
import sys
from pathlib import Path

EXIT_CODE = 99


def check() -> None:
    """Runs after all other exit handlers, because handlers that a script registers later run first."""
    if any("gloo" in (thread / "comm").read_text() for thread in Path("/proc/self/task").glob("*")):
        print("a thread of gloo is alive at the interpreter's shutdown", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


if __name__ == "__main__":
    atexit.register(check)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
