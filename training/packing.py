"""The state of any optimizer as plain data, which torch.load takes back without executing anything.

`Packer.pack` makes copies on the host. A parameter becomes its name. An object of the optimizer's own package becomes its
attributes. Other objects that the newly built optimizer has at the same place are taken from there.
"""

import io
import random
import sys
from collections import deque
from collections.abc import Iterator
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
_HOST = torch.device("cpu")
_TAG = "\0"  # the first word of a tuple that stands for something else


class Packer:
    """Packs and unpacks the state of an optimizer of class `kind` that trains `parameters` on `device`."""

    def __init__(self, parameters: dict[str, Parameter], kind: type, device: torch.device) -> None:
        self._parameters, self._device = parameters, device
        self._names = {id(p): name for name, p in parameters.items()}
        self._package = kind.__module__.partition(".")[0]
        self._copies: dict[int, Any] = {}

    def pack(self, value: Any, place: str) -> Any:
        """A copy of nested containers on the host. Raises TypeError that names the place of what is not data.

        What is the same tensor in two places stays the same.
        """
        self._copies = {}
        try:
            return self._pack(value, place)
        finally:
            self._copies = {}

    def _pack(self, value: Any, place: str) -> Any:
        if id(value) in self._names:
            return (_TAG, "parameter", self._names[id(value)])
        if isinstance(value, Tensor):
            if id(value) not in self._copies:
                # (The value is kept too, so that no other gets its id.)
                self._copies[id(value)] = value, (_TAG, "tensor", _copy(value, _HOST), value.device.type != "cpu")
            return self._copies[id(value)][1]
        if type(value) in _PLAIN:
            return value
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            return (_TAG, "array", torch.from_numpy(value.copy()))
        if isinstance(value, torch.Generator):
            return (_TAG, "generator", str(value.device), value.get_state())
        if type(value) is random.Random:
            return (_TAG, "random", self._pack(value.getstate(), place))
        if isinstance(value, dict):
            items = [(self._pack(k, place), self._pack(v, f"{place}.{_word(k)}".lstrip("."))) for k, v in value.items()]
            return (_TAG, "dict", items) if any(isinstance(key, tuple) for key, _ in items) else dict(items)
        if type(value) in (list, tuple, set, deque):
            items = [self._pack(item, f"{place}.{i}") for i, item in enumerate(value)]
            length = value.maxlen if isinstance(value, deque) else None
            return items if type(value) is list else (_TAG, type(value).__name__, items, length)
        if isinstance(value, Enum) and type(value).__module__.partition(".")[0] == self._package:
            return (_TAG, "member", type(value).__module__, type(value).__qualname__, value.name)
        if callable(value) or isinstance(value, Enum):
            return (_TAG, "as built", place)
        if type(value).__module__.partition(".")[0] == self._package and hasattr(value, "__dict__"):
            attributes = self._pack(vars(value), f"{place}.{type(value).__name__}")
            return (_TAG, "object", type(value).__module__, type(value).__qualname__, attributes)
        if place.startswith("param_groups"):
            return (_TAG, "as built", place)
        raise TypeError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}")

    def unpack(self, value: Any, built: Any) -> Any:
        """The inverse of `pack`. `built`: the state of the newly built optimizer."""
        return self._unpack(value, built, {})

    def _unpack(self, value: Any, built: Any, made: dict[int, Any]) -> Any:
        if isinstance(value, list):
            return [self._unpack(item, _inside(built, i), made) for i, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self._unpack(item, _inside(built, key), made) for key, item in value.items()}
        if not (type(value) is tuple and value and value[0] == _TAG):
            return value
        kind, *rest = value[1:]
        if kind == "tensor":
            if id(value) not in made:
                made[id(value)] = _copy(rest[0], self._device if rest[1] else _HOST)
            return made[id(value)]
        if kind == "parameter":
            return self._parameters[rest[0]]
        if kind == "array":
            return rest[0].numpy().copy()
        if kind == "generator":
            generator = torch.Generator(self._device if rest[0] != "cpu" else "cpu")
            return generator.set_state(rest[1])
        if kind == "random":
            drawer = random.Random()
            drawer.setstate(self._unpack(rest[0], None, made))
            return drawer
        if kind == "dict":
            return {self._unpack(k, None, made): self._unpack(v, None, made) for k, v in rest[0]}
        if kind == "object":
            made_here = object.__new__(self._class(rest[0], rest[1], object))
            vars(made_here).update(self._unpack(rest[2], None, made))
            return made_here
        if kind == "member":
            return self._class(rest[0], rest[1], Enum).__members__[rest[2]]
        if kind == "as built":
            if built is None:
                raise TypeError(f"{rest[0]} can't be saved, and the new optimizer has none")
            return built
        items = [self._unpack(item, _inside(built, i), made) for i, item in enumerate(rest[0])]
        return deque(items, rest[1]) if kind == "deque" else set(items) if kind == "set" else tuple(items)

    def _class(self, module: str, name: str, base: type) -> Any:
        """A class of the optimizer's own package, which this process has imported. Nothing of it is called."""
        found: Any = sys.modules.get(module) if module.partition(".")[0] == self._package else None
        for part in name.split("."):
            found = vars(found).get(part) if found is not None else None
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TypeError(f"there is no class {module}.{name}")
        return found


def to_bytes(packed: Any) -> bytes:
    """What `pack` gave, as the content of a file."""
    buffer = io.BytesIO()
    torch.save(packed, buffer)
    return buffer.getvalue()


def from_bytes(content: bytes) -> Any:
    """What `to_bytes` was given. Nothing is executed.

    Subclasses of Tensor are made again only if this process has already imported them.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
    found = [getattr(sys.modules.get(module), name, None) for module, _, name in (full.rpartition(".") for full in names)]
    allowed: list[Any] = [kind for kind in found if isinstance(kind, type) and issubclass(kind, Tensor)]
    with torch.serialization.safe_globals(allowed):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """The plain floating-point tensors in nested containers, each with its place."""
    if type(value) in (Tensor, Parameter) and value.is_floating_point() and value.numel() and value.layout == torch.strided:
        yield place, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        yield from leaves(item, f"{place}.{_word(key)}".lstrip("."))


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a == b or a != a)


def _copy(value: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without the rest of the storage that a view belongs to."""
    if is_traceable_wrapper_subclass(value):  # made of plain tensors; many lack `clone`, and torchao's `detach` loses the dtype
        names, rest = value.__tensor_flatten__()
        parts = {name: _copy(getattr(value, name), device) for name in names}
        return type(value).__tensor_unflatten__(parts, rest, value.size(), value.stride())
    value = value.detach()
    return value.clone() if value.device.type == device.type else value.to(device)


def _inside(built: Any, key: Any) -> Any:
    try:
        return built[key]
    except (KeyError, IndexError, TypeError):
        return None


def _word(key: Any) -> str:
    return "parameter" if isinstance(key, Tensor) else str(key)
