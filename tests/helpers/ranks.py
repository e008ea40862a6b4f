"""Processes of one group that stay alive between tests, so that a test need not start N interpreters."""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.helpers.forked import context


class Ranks:
    """`world` processes of one process group; `run` calls a function in each of them.

    The functions are module-level, called as function(*arguments), and return what can be pickled. If a rank fails, dies
    or does not answer for `timeout` seconds, all are killed, `run` raises AssertionError with the message of each rank,
    and the next `run` starts new ones. With the backend nccl, each rank has a card of its own. `start` is a start method of
    multiprocessing; by default a server forks the processes.
    """

    def __init__(self, world: int, timeout: float = 30, backend: str = "gloo", start: str = "") -> None:
        self.world, self.timeout, self.backend = world, timeout, backend
        self._context = multiprocessing.get_context(start) if start else context()
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(answers) < self.world and time.monotonic() < deadline:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(waiting), timeout=max(0, deadline - time.monotonic())):
                try:
                    answers[waiting[pipe]] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[waiting[pipe]] = (False, "died")
                if not answers[waiting[pipe]][0]:  # the others may now wait for it forever
                    deadline = min(deadline, time.monotonic() + 3)
        if len(answers) < self.world or not all(ok for ok, _ in answers.values()):
            self.stop()
            said = {
                rank: answers.get(rank, (False, "no answer: it waits for another rank, or is still running"))
                for rank in range(self.world)
            }
            raise AssertionError("\n".join(f"rank {rank}: {text}" for rank, (ok, text) in said.items() if not ok))
        return [answers[rank][1] for rank in range(self.world)]

    def _start(self) -> None:
        handle, meeting = tempfile.mkstemp()
        os.close(handle)
        os.unlink(meeting)
        for rank in range(self.world):
            ours, theirs = self._context.Pipe()
            where = (rank, self.world, meeting, theirs, self.timeout, self.backend)
            process = self._context.Process(target=_serve, args=where, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, world: int, meeting: str, pipe: Connection, timeout: float, backend: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the parent has ended
            return
        faulthandler.dump_traceback_later(0.9 * timeout)  # to stderr: where it hangs
        try:
            torch.manual_seed(0)
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps(answer))
