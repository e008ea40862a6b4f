"""A failure that the user can fix is a `UserError`: one line on stderr, exit code 2, no traceback."""

import argparse
import io
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """A failure whose message says, in one line, what is wrong and what to do about it.

    `everywhere`: all ranks raise it, so only rank 0 prints it.
    """

    exit_code = 2

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class Diverged(UserError):
    """A loss, a gradient or a state of a run is not finite. Every rank raises it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, everywhere=True)


def failure_of(act: Callable[..., Any], *arguments: Any) -> str:
    """Call `act`. Returns the message of its UserError; empty if there is none."""
    try:
        act(*arguments)
    except UserError as error:
        return str(error)
    return ""


@contextmanager
def as_written(path: Path, remedy: str) -> Iterator[None]:
    """If the block fails because `path` is missing or malformed, raise a UserError that names it and the remedy."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise UserError(f"{path} is damaged or was written by another version ({reason}); {remedy}") from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positive(text: str) -> int:
    """An option that is an integer of at least 1, for `add_argument(type=...)`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
    return int(text)


# If several ranks fail, the first to claim it prints the error. `Ranks.start` sets this.
claim_to_tell: Callable[[], bool] | None = None
_GRACE_SECONDS = 2.0


def say(text: str) -> None:
    """Print a line. A full disk under stdout does not stop a run."""
    with suppress(OSError):
        print(text, flush=True)


@contextmanager
def one_line_errors(program: str, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn a failure that the user can fix into one line on stderr, from one rank, and exit code 2 on every rank.

    `interrupted` is the message after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters does not stop a run
    try:
        yield
        sys.stdout.flush()  # an error here would otherwise be a traceback when the interpreter ends
        return
    except UserError as error:
        code = error.exit_code
        _tell(f"{program}: {error}", error.everywhere)
        if code == 2:  # all ranks are alive, so a checkpoint in progress can be finished
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
    except OSError as error:
        code = 2
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            code = 141  # what a shell reports for a broken pipe
        else:
            _tell(
                f"{program}: {error.filename2 or error.filename or 'input/output'}: {error.strerror or error}", everywhere=False
            )
    except KeyboardInterrupt:
        code = 130
        _tell(f"{program}: {interrupted}", everywhere=True)
    except Exception as error:
        if _out_of_memory(error):
            code = 2
            _tell(f"{program}: out of memory; choose smaller sizes (of a run: --micro-batch-size)", everywhere=False)
        elif "RANK" not in os.environ:
            raise
        else:
            traceback.print_exc()
            code = 1
    leave(code)


def _reader_is_gone() -> bool:
    """Whether the reader of stdout has closed it, as `| head -1` does."""
    stdout = select.poll()
    stdout.register(1, 0)
    return bool(stdout.poll(0))


def _out_of_memory(error: Exception) -> bool:
    """Whether this is Python's error or one of torch's, on a GPU or a CPU."""
    said = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", str(error))
    return isinstance(error, MemoryError) or bool(said)


def leave(code: int = 0) -> NoReturn:
    """End this process with `code`.

    A rank skips the interpreter's shutdown. Ranks that leave at different times must not wait for each other there, and a gloo
    thread that frees its last tensor there aborts the process. (`destroy_process_group` joins these threads only if nothing
    else holds the group, and modules that torch imports late do hold it.)
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk must not change the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)


def _tell(line: str, everywhere: bool) -> None:
    """Print the line, unless another rank does."""
    rank = os.environ.get("RANK", "0")
    if rank != "0" and everywhere:
        return
    if claim_to_tell is not None and not everywhere:
        if not claim_to_tell():
            return
    elif rank != "0":
        # Most likely rank 0 reports the same, and torchrun then ends this rank. If not, only this rank knows.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
        time.sleep(_GRACE_SECONDS)
    print(line if rank == "0" else f"{line} (rank {rank})", file=sys.stderr, flush=True)
