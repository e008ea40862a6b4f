"""The ranks of a run: one process, or those that torchrun started."""

import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import errors
from common.errors import UserError
from training.devices import choose_device, device_of_rank, number

T = TypeVar("T")
P = ParamSpec("P")


class LostRankError(UserError):
    """Another rank died or hangs. No option can fix that, so the exit code is not 2."""

    exit_code = 1


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others, and its device.

    `host` is a group for messages between CPUs. `roll_call` is a group used only to find out which rank is missing. `store` is
    the key-value store of the ranks.
    """

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup | None = None
    roll_call: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @classmethod
    def start(cls, device: str, timeout: float) -> "Ranks":
        """Choose the device and, under torchrun, join the process group (nccl on CUDA, gloo elsewhere).

        A rank that does not answer for `timeout` seconds ends the run.
        """
        if "RANK" not in os.environ:
            return cls(0, 1, choose_device(device))
        rank, size = number("RANK", 0, 2**20), number("WORLD_SIZE", 1, 2**20)
        if rank >= size:
            raise UserError(f"RANK = {rank} is outside WORLD_SIZE = {size}; start the ranks with torchrun")
        chosen = device_of_rank(device, rank)
        if chosen.type == "mps" and size > 1:
            raise UserError("several ranks can't share an Apple GPU; start one, or use --device cpu")
        store = _meet(timedelta(seconds=timeout))
        errors.claim_to_tell = partial(_claim, store)
        # The group on the host must be the first to notice a missing rank: nccl's own timeout aborts the process.
        longer = timedelta(seconds=timeout + 60 if chosen.type == "cuda" else timeout)
        try:
            if chosen.type == "cuda":
                torch.cuda.set_device(chosen)
                _check_shared(store, rank, size)
                dist.init_process_group("nccl", store=store, rank=rank, world_size=size, timeout=longer, device_id=chosen)
            else:
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=longer)
            groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) for _ in range(2)]
        except RuntimeError as error:
            raise UserError(f"the ranks could not form a group ({_first_line(error)})") from None
        return cls(rank, size, chosen, groups[0], groups[1], store)

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the ranks."""
        if self.size == 1:
            return model
        with warnings.catch_warnings():  # newer versions of torch have another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)

    def on_first(self, act: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call `act` on rank 0 and return its result on every rank. If it raises `UserError`, every rank does."""
        if self.size == 1:
            return act(*arguments, **options)
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = act(*arguments, **options)
            except UserError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0, group=self.host)
        if answer[1] is not None:
            raise UserError(answer[1], everywhere=True)
        return answer[0]

    def on_all(self, act: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Call `act` on every rank and return its result there. If any raises `UserError`, all raise the lowest rank's."""
        if self.size == 1:
            return act(*arguments, **options)
        result: Any = None
        failure = None
        try:
            result = act(*arguments, **options)
        except UserError as error:
            failure = str(error)
        for rank, text in enumerate(self.gather(failure)):
            if text is not None:
                raise UserError(text if rank == 0 else f"{text} (rank {rank})", everywhere=True)
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the ranks, on the device. May overwrite `value`, as `largest` does."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def total(self, value: float) -> float:
        """The sum over the ranks, in double on the hosts."""
        return math.fsum(self.gather(value))

    def largest(self, value: Tensor) -> Tensor:
        """The maximum over the ranks, on the device."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def check_identical(self, model: nn.Module) -> None:
        """Assert that the weights of all ranks are the same, bit for bit."""
        if self.size == 1:
            return
        mine = torch.stack([_fingerprint(p) for p in model.parameters()])
        others = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(others, mine)
        for rank, theirs in enumerate(others):
            assert torch.equal(others[0], theirs), f"the weights of rank {rank} differ from those of rank 0"

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """If communication fails in this block, raise a LostRankError that names the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _COMMUNICATION.search(str(error)):
                raise
            raise LostRankError(self._who_is_lost(error)) from None

    def _who_is_lost(self, error: RuntimeError) -> str:
        lost = "another rank" if self.first else "rank 0"  # rank 0 learns of all missing ranks, the others only of rank 0
        try:
            dist.monitored_barrier(self.roll_call, timeout=timedelta(seconds=3), wait_all_ranks=self.first)
        except RuntimeError as missing:
            if named := re.search(r"Ranks? ([\d, ]+) failed to pass", str(missing)):
                lost = f"rank{'s' * (',' in named[1])} {named[1].strip()}"
        return f"{lost} died or hangs ({_first_line(error)}); --resume auto continues from the newest checkpoint"

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.barrier(group=self.host)  # no rank closes its connections while another still needs them
            dist.destroy_process_group()
            errors.claim_to_tell = None


def _meet(timeout: timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT. torchrun holds it there; without torchrun, rank 0 does.

    torch would look for a host that does not exist until the time is over, so that is checked first.
    """
    port = number("MASTER_PORT", 1, 2**16)
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise UserError("RANK is set and MASTER_ADDR is not: start the ranks with torchrun, or unset RANK for one process")
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise UserError(f"MASTER_ADDR = {host} can't be found ({error.strerror}); torchrun sets it") from None
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except (RuntimeError, ValueError) as error:
        if "already in use" in str(error).lower():
            raise UserError(f"MASTER_PORT = {port} is taken; choose another") from None
        raise UserError(f"the ranks can't meet at {host}:{port} ({_first_line(error)})") from None
    return dist.PrefixStore(f"launch{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _check_shared(store: dist.Store, rank: int, size: int) -> None:
    """Raise UserError if another rank has this rank's GPU. All ranks call it."""
    mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    store.set(f"gpu{rank}", mine)
    sharing = store.multi_get([f"gpu{other}" for other in range(size)]).count(mine.encode())
    if sharing > 1:
        count = torch.cuda.device_count()
        raise UserError(f"{sharing} ranks have the same GPU; start one for each, as torchrun --nproc_per_node={count} does")


def _claim(store: dist.Store) -> bool:
    """Whether this rank is the first to report what went wrong."""
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # the store died with the rank that held it
        return True


# Distinguishes errors of gloo, nccl and the store from others: all are RuntimeErrors.
_COMMUNICATION = re.compile(r"gloo|NCCL|nccl|Connection (closed|reset|refused)|[Tt]imed? ?out|monitoredBarrier|TCPStore")


def _first_line(error: BaseException) -> str:
    """A torch error in a few words, without its source location and stack."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = re.sub(r"^\[[^]]*\] ", "", text)
    return text[:200].rstrip(". ")


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(p: Tensor) -> Tensor:
    """A sum that changes with any bit, position included."""
    bits = p.detach().view(_INTEGERS[p.element_size()]).flatten().to(torch.int64)
    return (bits * (torch.arange(bits.numel(), device=bits.device) % 1048573 + 1)).sum()
