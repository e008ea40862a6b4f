"""A CPU that plays a GPU: its tensors say that they are on "cuda" or "mps", and do what that device would not do alone.

The values are real, so whole runs can be compared. What a device lacks is an error, and so is a computation with tensors of two
devices. Each wait of the host for the device is noted. Without values, the device's tensors take no memory and no time, so a
model of any size runs; what the host reads then is 0, False, or a list of ones.
"""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # looks at what is patched below when it is imported
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing

from optim import exchange, polar
from training import ranks

LACKS = {"mps": {torch.float64, torch.complex128, torch.uint16}, "cuda": set[torch.dtype]()}
ATEN = torch.ops.aten
# The host needs their result, or the size of it.
READS = {
    ATEN._local_scalar_dense,
    ATEN.equal,
    ATEN.is_nonzero,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN._unique2,
    ATEN.unique_dim,
}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}


class Pretended(TorchFunctionMode):
    """While active, the device of this type exists. `waits`: where the host waited for it so far."""

    def __init__(self, kind: str, values: bool = True) -> None:
        super().__init__()
        self.device, self.waits = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))), list[str]()
        self.values = values

    def wait(self, why: str) -> None:
        ours = [f for f in traceback.extract_stack() if "/site-packages/" not in f.filename and "pretended" not in f.filename]
        self.waits.append(f"{why} at {ours[-1].filename}:{ours[-1].lineno}" if ours else why)

    def here(self, inner: Tensor) -> Tensor:
        """The same values on the device."""
        return OnDevice(inner if self.values else inner.to("meta"), self)

    def back(self, inner: Tensor) -> Tensor:
        """A copy on the host."""
        if self.values:
            return inner.clone()
        zeros = np.zeros(inner.numel() * inner.element_size(), np.uint8)  # takes no memory until it is written to
        return torch.from_numpy(zeros).view(inner.dtype).view(inner.shape)

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if function in MOVES:
            return self._move(function, *arguments, **options)
        if function is Tensor.tolist and isinstance(arguments[0], OnDevice):
            self.wait("tolist")
            inner = arguments[0].inner
            return inner.tolist() if self.values else torch.ones(inner.shape, dtype=inner.dtype).tolist()
        if (device := options.get("device")) is not None:
            pinned = options.pop("pin_memory", False)
            if torch.device(device).type == self.device.type:
                options["device"] = "cpu" if self.values else "meta"
                return _each(self.here, function(*arguments, **options))
            assert not pinned or self.device.type == "cuda"
        elif options.pop("pin_memory", False):
            assert self.device.type == "cuda", "only CUDA has pinned memory"
        return function(*arguments, **options)

    def _move(self, function: Any, tensor: Tensor, *arguments: Any, copy: bool = False, **options: Any) -> Tensor:
        if function is Tensor.cpu:
            arguments = ("cpu", *arguments)
        elif function is Tensor.cuda:
            arguments = (arguments[0] if arguments else "cuda",)
        elif arguments and isinstance(arguments[0], Tensor):  # `to(other)`
            arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*arguments, **options)
        there = isinstance(tensor, OnDevice)
        if device is None or (device.type == self.device.type) == there:
            return Tensor.to(tensor, dtype or tensor.dtype, copy=copy)
        assert not tensor.requires_grad or not torch.is_grad_enabled()
        if there:
            if not non_blocking:
                self.wait("a copy to the host")
            return self.back(tensor.inner).to(dtype or tensor.dtype)
        if not (non_blocking and self.device.type == "cuda"):
            self.wait("a copy to the device")
        return self.here(tensor.detach().to(dtype=dtype or tensor.dtype, copy=True))


class OnDevice(Tensor):
    """A tensor on the pretended device; `inner` holds its values. (C++ takes it for one on the CPU.)"""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor
    place: Pretended

    @staticmethod
    def __new__(cls, inner: Tensor, place: Pretended):
        lacking = inner.dtype in LACKS[place.device.type]
        assert not lacking, f"{place.device.type} has no {inner.dtype}"
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: Tensor, place: Pretended) -> None:
        self.inner, self.place = inner, place

    device = property(lambda self: self.place.device)
    is_cuda = property(lambda self: self.place.device.type == "cuda")
    is_mps = property(lambda self: self.place.device.type == "mps")
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        options = options or {}
        tensors: list[Tensor] = []
        _each(tensors.append, (arguments, options))
        place = next(t.place for t in tensors if isinstance(t, OnDevice))
        packet = function.overloadpacket
        if packet is ATEN.copy_:
            into, source = (isinstance(t, OnDevice) for t in arguments[:2])
            if into != source and not (place.device.type == "cuda" and len(arguments) > 2 and arguments[2]):
                place.wait(f"a copy to the {'device' if into else 'host'}")
        else:
            away = [t for t in tensors if not isinstance(t, OnDevice) and t.ndim]
            assert not away, f"{function} gets tensors of two devices"
        index = packet is ATEN.index and any(t.dtype == torch.bool for t in tensors[1:])
        if packet in READS or index:
            place.wait(str(packet))
        if packet is ATEN._local_scalar_dense and not place.values:
            return place.back(arguments[0]).item()
        if packet is ATEN.copy_ and not isinstance(arguments[0], OnDevice):
            return arguments[0].copy_(place.back(arguments[1].inner))
        if not place.values:
            return _without_values(place, function, arguments, options)
        out = _each(place.here, function(*_inner(arguments), **_inner(options)))
        return return_and_correct_aliasing(function, arguments, options, out)


def _each(act: Callable[[Tensor], Any], value: Any) -> Any:
    """The same containers with `act` of each tensor."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, dict):
        return {name: _each(act, item) for name, item in value.items()}
    return type(value)([_each(act, item) for item in value]) if isinstance(value, list | tuple) else value


def _inner(value: Any) -> Any:
    return _each(lambda t: t.inner if isinstance(t, OnDevice) else t, value)


_KNOWN: dict[Any, Any] = {}  # what an operation gave without values, by the sizes of its inputs


def _without_values(place: Pretended, function: Any, arguments: tuple, options: dict[str, Any]) -> Any:
    """The result of an operation whose tensors have sizes alone. A run repeats a few, which are worked out once."""
    key = function, _sizes(arguments), _sizes(options)
    if key not in _KNOWN:
        if options.get("device") is not None:  # "cpu", as C++ sees it
            options = options | {"device": torch.device("meta")}
        _KNOWN[key] = function(*_inner(arguments), **_inner(options))
    if function._schema.is_mutable:
        return options.get("out", arguments[0]) if function._schema.returns else None
    return _each(place.here, _KNOWN[key])


def _sizes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, type(value)
    if isinstance(value, dict):
        return tuple((name, _sizes(item)) for name, item in value.items())
    return tuple(map(_sizes, value)) if isinstance(value, list | tuple) else (type(value), value)


@contextlib.contextmanager
def pretended(kind: str, values: bool = True) -> Iterator[Pretended]:
    """In this block a device of this kind ("cuda", "mps") exists, and is the best one. It has no bfloat16 units."""
    device = Pretended(kind, values)
    made = {"mem_get_info": (8 * 2**30, 8 * 2**30), "get_device_name": "a pretended card", "get_device_capability": (7, 5)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        patch.setattr(torch.cuda, "device_count", lambda: int(kind == "cuda"))
        patch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")
        # Otherwise torch's optimizers ask the driver for a stream.
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
        patch.setattr(torch.accelerator, "synchronize", lambda *_: device.wait("synchronize"))
        patch.setattr(Tensor, "pin_memory", lambda self, *_: self)
        patch.setattr(Tensor, "is_pinned", lambda self, *_: kind == "cuda")
        module = torch.cuda if kind == "cuda" else torch.mps
        patch.setattr(module, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8))
        patch.setattr(module, "set_rng_state", lambda *_: None)
        if kind == "cuda":
            for name, value in made.items():
                patch.setattr(torch.cuda, name, lambda *_, value=value: value)
            patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            patch.setattr(torch.cuda, "Event", lambda: Event(device))
            patch.setattr(torch.cuda.nccl, "version", lambda: (2, 0, 0))
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):  # C++ takes our tensors for ones on the CPU
            ask = getattr(torch, name)
            patch.setattr(torch, name, lambda _, *rest, ask=ask, **options: ask("cpu", *rest, **options))
        # `module.to` then exchanges whole tensors, and not only what they hold, which would leave them of their old class.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        polar.has_bfloat16_units.cache_clear()
        try:
            with device:
                yield device
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
            polar.has_bfloat16_units.cache_clear()


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, device: Pretended) -> None:
        self._device = device

    def record(self, *_: object) -> None:
        pass

    def synchronize(self) -> None:
        self._device.wait("event")


_HELD: list[object] = []  # for the life of a process


def be_a_rank_with_a_gpu() -> None:
    """In the process of a rank, for its life: it has a card of its own, and gloo plays nccl, which takes no host tensors.

    DDP's C++ code can't have our tensors, so `Averaged` is in its place.
    """
    _HELD.append(block := pretended("cuda"))
    block.__enter__()
    start = dist.init_process_group

    def init(backend: str, device_id: torch.device, **options: Any) -> None:
        assert backend == "nccl" and device_id.index == int(os.environ["LOCAL_RANK"])
        start("gloo", **options)

    def playing_nccl(collective: Callable) -> Callable:
        def call(*arguments: Any, group: Any = None, **options: Any) -> Any:
            tensors: list[Tensor] = []
            _each(tensors.append, arguments)
            there = group is None or group is dist.group.WORLD
            assert all(isinstance(t, OnDevice) == there for t in tensors), f"{collective.__name__} has the wrong device"
            return collective(*_inner(arguments), group=group, **options)

        return call

    dist.init_process_group = init
    dist.all_reduce, dist.all_gather = playing_nccl(dist.all_reduce), playing_nccl(dist.all_gather)
    exchange._all_gather = playing_nccl(exchange._all_gather)
    ranks.DistributedDataParallel = Averaged
    torch.cuda.device_count = lambda: int(os.environ["LOCAL_WORLD_SIZE"])
    torch.cuda.set_device = lambda _: None
    torch.cuda.current_device = lambda: int(os.environ["LOCAL_RANK"])
    torch.cuda.get_device_properties = lambda number: SimpleNamespace(uuid=number)


class Averaged(torch.nn.Module):
    """In place of DDP."""

    def __init__(self, module: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self._last = module, True

    def forward(self, *arguments: Any) -> Tensor:
        loss = self.module(*arguments)
        if self._last:
            loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self._average))
        return loss

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self._last = False
        yield
        self._last = True

    def _average(self) -> None:
        """At the end of the backward pass."""
        for p in self.module.parameters():
            dist.all_reduce(p.grad.div_(dist.get_world_size()))
