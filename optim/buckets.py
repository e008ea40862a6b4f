"""Parameters whose directions are computed in one batched call and travel in one message."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .norms import Norm, Sign, Spectral
from .polar import work_dtype
from .shares import buffer_dtype, local

# Largest number of elements in a bucket of several parameters. Buckets let one travel while the next is computed, and they
# bound the memory that a step needs in addition to the momentum.
BUCKET_ELEMENTS = 2**26
# On a CPU without communication: small enough for its caches, and for malloc to reuse memory instead of mapping fresh pages.
CPU_BUCKET_ELEMENTS = 2**18


def split(params: Sequence[Tensor], norm_of: Callable[[Tensor], Norm | None], alone: bool) -> Iterator[list[Tensor]]:
    """The parameters of a group, bucket by bucket.

    A bucket has one device, one dtype and one placement, and for spectral norms one shape up to transposition. `alone`: the
    directions stay on this rank.
    """
    alike: dict[object, list[Tensor]] = {}
    for p in params:
        if p.numel() == 0:
            continue
        norm, shape = norm_of(p), None
        if isinstance(norm, Spectral):
            whole = p.shape if norm.stack else (p.shape[0], math.prod(p.shape[1:]))
            shape = (norm.stack, *whole[:-2], *sorted(whole[-2:]))
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


class Piece(NamedTuple):
    """Some rows of the direction of a bucket's member."""

    member: int
    rows: slice
    direction: Tensor


@dataclass
class Bucket:
    """Parameters on their way through an update: the LMO's inputs, the directions, the move of the weights."""

    params: Sequence[Tensor]
    norm: Norm | None  # None if the inputs are the directions already (AdamW)
    inputs: Callable[[], list[Tensor | None]]  # this rank's part of each member's LMO input, None if it has none
    moves: Sequence[bool]  # whether each member moves, as far as this rank knows
    step: float  # lr · radius
    decay: float  # lr · weight_decay

    @property
    def travel_dtype(self) -> torch.dtype:
        """Directions travel in the dtype that they are computed in, signs in one byte."""
        p = self.params[0]
        if isinstance(self.norm, Sign):
            return torch.int8
        if isinstance(self.norm, Spectral):
            # An expanded tensor has the shape and the dtype of the LMO's input, and no memory.
            return work_dtype(self.norm.matrix(local(p).new_empty((), dtype=buffer_dtype(p)).expand(p.shape)), self.norm.polar)
        return buffer_dtype(p)

    def directions(self, inputs: list[Tensor | None]) -> list[Tensor | None]:
        """The directions of these inputs. Empties the list, so that inputs made for this call are freed early."""
        members = [m if moves else None for m, moves in zip(inputs, self.moves, strict=True)]
        inputs.clear()
        if isinstance(self.norm, Spectral):
            _replace_by_polar_factors(members, self.norm)
        elif self.norm is not None:
            members = [None if m is None else self.norm.direction(self.norm.matrix(m)) for m in members]
        return members

    def move(self, pieces: list[Piece], flags: Tensor | None) -> None:
        """Move the weights by these pieces of directions (the host does not wait for the device).

        `flags`: 1 or 0 for each piece, if only its owner knows whether it moves.
        """
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
    """Replace the members, all of one shape up to transposition, by their directions in one batched call."""
    present = [i for i, m in enumerate(members) if m is not None]
    if not present:
        return
    matrices = [norm.matrix(m) for m in members if m is not None]
    tall = [m.size(-2) > m.size(-1) for m in matrices]
    wide = [m.mT if t else m for m, t in zip(matrices, tall, strict=True)]
    stack = torch.empty((len(wide), *wide[0].shape), dtype=work_dtype(wide[0], norm.polar), device=wide[0].device)
    torch._foreach_copy_(list(stack.unbind()), wide)
    for i in present:  # frees inputs that were made for this call
        members[i] = None
    del matrices, wide
    for i, t, direction in zip(present, tall, norm.direction(stack, overwrite=True).unbind(), strict=True):
        members[i] = direction.mT if t else direction
