"""A signal asks a run to stop. All ranks stop after the same step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from training.ranks import LostRankError, Ranks


class StopSignal:
    """SIGINT, SIGTERM and SIGUSR1 (a scheduler's warning) ask for a stop. All ranks stop after the same step.

    A context manager. Python allows signal handlers in the main thread only; in another thread it installs none.

    If a rank dies or hangs inside a collective, the main threads of the others wait inside torch, where no handler runs. So a
    thread also listens for signals. After one, it ends the process if the step takes too long. Time inside `pause`, as during
    a validation, does not count.
    """

    LEAST_WAIT = 5.0  # seconds; three times the longest step so far if that is longer

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._agreed = threading.Event()
        self._paused = False
        self._step_began, self._longest = time.monotonic(), 10.0  # a guess, until a step has been timed
        self._first_step = True
        self._pipe: tuple[int, int, int] | None = None  # read end, write end, the wakeup file from before

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._ask)
            if self._ranks.size > 1:
                ours, theirs = os.pipe()
                os.set_blocking(theirs, False)
                self._pipe = ours, theirs, signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
                self._thread = threading.Thread(target=self._listen, args=(ours,), daemon=True)
                self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        if self._pipe is not None:
            (ours, theirs, before), self._pipe = self._pipe, None
            signal.set_wakeup_fd(before)
            self._agreed.set()
            os.close(theirs)  # the thread then reads the end of the file
            self._thread.join()
            os.close(ours)

    def _listen(self, signals: int) -> None:
        """In a thread: after SIGINT or SIGTERM, end the process unless the ranks agree to stop in time."""
        while number := os.read(signals, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            wait = left = max(self.LEAST_WAIT, 3 * self._longest)
            while left > 0 and not self._agreed.wait(0.1):
                left -= 0.0 if self._paused else 0.1
            if not self._agreed.is_set():
                late = f"the step was not over {wait:.0f} s after {signal.Signals(number[0]).name}"
                advice = "another rank may have died; --resume auto continues from the newest checkpoint"
                print(f"train_gpt: rank {self._ranks.rank}: {late}: {advice}", file=sys.stderr, flush=True)
                os._exit(LostRankError.exit_code)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside this block, no step is late."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def finish(self) -> None:
        """Call this after the last step: none can be late any more."""
        self._agreed.set()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)

    def agreed(self) -> str:
        """Why to stop: "", "interrupted" by the user, or "preempted". Every rank must call it once a step.

        The hosts wait for each other here, the devices do not: a host has only queued the work of the step.
        """
        vote = torch.tensor([0 if self._asked is None else 1 if self._asked == signal.SIGINT else 2], dtype=torch.int32)
        if self._ranks.size > 1:
            dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._ranks.host)
        now = time.monotonic()
        took, self._step_began = now - self._step_began, now
        self._longest, self._first_step = took if self._first_step else max(took, self._longest), False
        why = ("", "interrupted", "preempted")[int(vote.item())]
        if why:
            self._agreed.set()
        return why
