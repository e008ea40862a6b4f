"""What a user can mend is a `UserError`: one line on stderr, exit code 2, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A failure whose message says, in one line, what is wrong and what to do about it."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr, from rank 0 alone, and exit code 2 of every rank."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # Ranks that leave at different times must not wait for each other in an interpreter's shutdown.
        if "RANK" in os.environ:
            os._exit(2)
        sys.exit(2)
