"""The ranks of a run: one process, or those that torchrun started."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others, and its device. `host` is a group for messages between CPUs."""

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @classmethod
    def start(cls, device: str) -> "Ranks":
        """Choose the device and, under torchrun, join the process group (nccl on CUDA, gloo elsewhere)."""
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        chosen = _choose_device(device, local_rank)
        if "RANK" not in os.environ:
            return cls(0, 1, chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
        return cls(dist.get_rank(), dist.get_world_size(), chosen, dist.new_group(backend="gloo"))

    def agree(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; a `UserError` there is raised everywhere."""
        if self.size == 1:
            return decide()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = decide()
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.host)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, on the device."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def total(self, value: Tensor) -> Tensor:
        """The sum over the ranks, on the device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def check_identical(self, model: nn.Module) -> None:
        """Assert that the weights of all ranks are the same, bit for bit."""
        if self.size == 1:
            return
        mine = torch.stack([_fingerprint(p) for p in model.parameters()])
        others = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(others, mine)
        for rank, theirs in enumerate(others):
            assert torch.equal(others[0], theirs), f"the weights of rank {rank} differ from those of rank 0"

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class StopSignal:
    """SIGINT and SIGTERM ask for a stop; all ranks learn of it at the same step, without waiting for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._asked = ranks, False
        self._work: dist.Work | None = None
        self._votes = torch.zeros(1, dtype=torch.int32)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self._asked = True

    def agreed(self) -> bool:
        """Whether any rank had been asked when all last voted. To be called once a step, by every rank."""
        if self._ranks.size == 1:
            return self._asked
        stop = False
        if self._work is not None:
            self._work.wait()
            stop = bool(self._votes.item())
        self._votes.fill_(int(self._asked))
        self._work = dist.all_reduce(self._votes, group=self._ranks.host, async_op=True)
        return stop


def _choose_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError("--device cuda, but torch finds no CUDA device here; use --device cpu or a CUDA build of torch")
        if local_rank >= count:
            raise UserError(f"torchrun started more processes than the {count} GPUs here; use --nproc_per_node={count}")
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps, but torch finds no Apple GPU here; use --device cpu")
    return torch.device(name)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(p: Tensor) -> Tensor:
    """A sum that changes with any bit, position included."""
    bits = p.detach().view(_INTEGERS[p.element_size()]).flatten().to(torch.int64)
    return (bits * (torch.arange(bits.numel(), device=bits.device) % 1048573 + 1)).sum()
