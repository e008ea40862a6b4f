"""Parameters whose directions are computed in one batched call and travel in one message."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .exchange import Alone, local
from .norms import Norm, Sign, Spectral
from .polar import work_dtype

# Largest number of elements in a bucket of several parameters. Buckets let one travel while the next is computed, and they
# bound the memory that a step needs in addition to the momentum.
BUCKET_ELEMENTS = 2**26
# On a CPU without communication: small enough for its caches, and for malloc to reuse memory instead of mapping fresh pages.
CPU_BUCKET_ELEMENTS = 2**18


def buffer_dtype(p: Tensor) -> torch.dtype:
    """Momentum is float32 at least, and float64 for float64 parameters."""
    return torch.promote_types(p.dtype, torch.float32)


def travel_dtype(p: Tensor, norm: Norm | None) -> torch.dtype:
    """Directions travel in the dtype that they are computed in, signs in one byte."""
    if isinstance(norm, Sign):
        return torch.int8
    if isinstance(norm, Spectral):
        matrix = local(p).new_empty((), dtype=buffer_dtype(p)).expand(p.shape[0], math.prod(p.shape[1:]))
        return work_dtype(matrix, norm.polar)
    return buffer_dtype(p)


def split(params: Sequence[Tensor], norm_of: Callable[[Tensor], Norm | None], alone: bool) -> Iterator[list[Tensor]]:
    """The parameters of a group, bucket by bucket.

    A bucket has one device, one dtype and one placement, and for spectral norms one shape up to transposition. `alone`: the
    directions stay on this rank.
    """
    alike: dict[object, list[Tensor]] = {}
    for p in params:
        if p.numel() == 0:
            continue
        shape = None
        if isinstance(norm_of(p), Spectral):
            shape = tuple(sorted((p.shape[0], math.prod(p.shape[1:]))))
        place = (p.device_mesh, p.placements) if isinstance(p, DTensor) else p.device
        alike.setdefault((shape, p.dtype, place), []).append(p)
    for members in alike.values():
        limit = CPU_BUCKET_ELEMENTS if alone and members[0].device.type == "cpu" else BUCKET_ELEMENTS
        part: list[Tensor] = []
        for p in members:
            if part and sum(q.numel() for q in part) + p.numel() > limit:
                yield part
                part = []
            part.append(p)
        yield part


@dataclass
class Bucket:
    """Parameters on their way through an update: inputs to their owners, directions back, weights moved."""

    params: Sequence[Tensor]
    norm: Norm | None  # None if the inputs are the directions already (AdamW)
    exchange: Alone
    inputs: Callable[[], list[Tensor | None]]  # this rank's part of each member's LMO input, None if it has none
    moves: Sequence[bool]  # whether each member moves, as far as this rank knows
    step: float  # lr · radius
    decay: float  # lr · weight_decay

    def gather(self) -> None:
        """Start to bring the inputs to their owners."""
        self.exchange.gather(self.inputs)

    def send_directions(self) -> None:
        """Compute the directions of the members that this rank owns, and start to send them."""
        members = [m if moves else None for m, moves in zip(self.exchange.whole(), self.moves, strict=True)]
        if isinstance(self.norm, Spectral):
            _replace_by_polar_factors(members, self.norm)
        elif self.norm is not None:
            members = [None if m is None else self.norm.direction(m.flatten(1) if m.ndim > 2 else m) for m in members]
        self.exchange.spread(members)

    def move_weights(self) -> None:
        """Wait for the directions and move the weights (the host does not wait for the device)."""
        pieces, flags = self.exchange.receive()
        keep: Sequence[float | Tensor] = [1 - self.decay] * len(pieces)
        if flags is not None and self.decay:
            keep = (1 - self.decay * flags.to(buffer_dtype(self.params[0]))).unbind()
        alike: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for (i, rows, direction), kept in zip(pieces, keep, strict=True):
            weights = local(self.params[i])
            weights = weights[rows] if weights.ndim else weights
            if self.decay:
                weights.mul_(kept)
            alpha = -self.step * (self.norm.factor(self.params[i].shape) if self.norm else 1.0)
            if direction.is_floating_point():
                targets, directions = alike.setdefault(alpha, ([], []))
                targets.append(weights)
                directions.append(direction.reshape(weights.shape))
            else:  # signs in one byte: this adds them without a float copy
                weights.add_(direction.view(weights.shape), alpha=alpha)
        for alpha, (targets, directions) in alike.items():
            torch._foreach_add_(targets, directions, alpha=alpha)


def _replace_by_polar_factors(members: list[Tensor | None], norm: Spectral) -> None:
    """Replace the matrices of the list, all of one shape up to transposition, by their directions in one batched call."""
    present = [i for i, m in enumerate(members) if m is not None]
    if not present:
        return
    matrices = [m.flatten(1) for m in members if m is not None]
    tall = [m.size(0) > m.size(1) for m in matrices]
    wide = [m.mT if t else m for m, t in zip(matrices, tall, strict=True)]
    stack = torch.empty((len(wide), *wide[0].shape), dtype=work_dtype(wide[0], norm.polar), device=wide[0].device)
    torch._foreach_copy_(list(stack.unbind()), wide)
    for i in present:  # frees inputs that were made for this call
        members[i] = None
    del matrices, wide
    for i, t, direction in zip(present, tall, norm.direction(stack, overwrite=True).unbind(), strict=True):
        members[i] = direction.mT if t else direction
