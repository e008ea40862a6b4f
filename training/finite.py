"""Finds losses and gradients that are not finite, on any rank, before they can reach a checkpoint.

Every pass ends with one small vector on the device. It says whether the loss and each parameter's gradient are finite. With
`--on-nan skip`, and on a CPU, where reading costs nothing, the vector is read at once. The pass then raises `NotFiniteError`,
which ends the optimizer's step before it changes weights or momentum. (In the second pass of MVR-1, -2 and -3 the momentum
already holds the old gradient, so it starts again from the next gradient.) On CUDA a run that would stop anyway does not wait
for the device: the vector is copied to the host while the next step is queued, and read one step later. Before anything is
written (metrics, checkpoints), `check` reads the vector that is still in flight.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common.errors import Diverged, say
from training.config import Config
from training.driver import Driver, NotFiniteError
from training.packing import leaves
from training.ranks import Ranks

_MOST_IN_A_ROW = 20


class FiniteGuard:
    """Watches the losses and gradients of a run. `skipped` counts the steps that were not finite."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | Driver, ranks: Ranks, config: Config, skipped: int = 0) -> None:
        self._model, self._optimizer, self._ranks = model, optimizer, ranks
        self._skip, self._batch_size = config.on_nan == "skip", config.batch_size
        self._later = ranks.device.type == "cuda" and not self._skip
        # Places in the state of an optimizer that is not ours where infinity is no trouble: "the best loss so far", say.
        self._infinite = optimizer.manner.infinite if isinstance(optimizer, Driver) else frozenset()
        self._names = ["loss", *(name for name, _ in model.named_parameters())]
        self._step = 0
        self._flags: Tensor | None = None  # of this step so far, on the device
        self._in_flight: tuple[int, Tensor, torch.cuda.Event] | None = None  # the last step's flags, on their way to the host
        self.skipped, self._in_a_row = skipped, 0

    def look(self, loss: Tensor) -> None:
        """At the end of a pass: note whether the loss and the gradients in `.grad` are finite."""
        # A sum is not finite if one of its terms is not. (A sum that overflows, with terms around 1e38, is as bad.)
        sums = [p.grad.sum() for p in self._model.parameters()]  # type: ignore[union-attr]  # all are used
        bad = ~torch.stack([loss.to(sums[0].dtype), *sums]).isfinite()
        # size - rank of the lowest bad rank; 0: no bad rank.
        flags = self._ranks.largest(bad.int() * (self._ranks.size - self._ranks.rank))
        self._flags = flags if self._flags is None else torch.maximum(self._flags, flags)
        if not self._later and flags.any():
            raise NotFiniteError

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wraps the optimizer's step. A skipped step ends early, without an error."""
        self._step, self._flags = step, None
        try:
            yield
        except NotFiniteError:
            assert self._flags is not None
            what = self._describe(step, self._flags)
            self._optimizer.zero_grad()
            if not self._skip:
                raise Diverged(f"{what}; {_ADVICE}") from None
            self.skipped += 1
            self._in_a_row += 1
            if self._in_a_row > _MOST_IN_A_ROW:
                raise Diverged(f"{what}, as in the {_MOST_IN_A_ROW} steps before; {_ADVICE}") from None
            if self._ranks.first:
                say(f"{what}; skipped, {self.skipped} in all")
        else:
            self._in_a_row = 0
            if self._later:
                self._read()
                self._send()

    def check(self, **losses: float) -> None:
        """Raise Diverged if any step so far, the last one included, or one of these losses is not finite."""
        self._read()
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise Diverged(f"step {self._step}: the {name} is {loss}; {_ADVICE}")

    def check_state(self) -> None:
        """Before a checkpoint: raise Diverged if a weight or a buffer of the optimizer is not finite."""
        self._read()
        names: dict[Tensor, str] = {p: name for name, p in self._model.named_parameters()}
        tensors = {f"the weights of {name}": p.detach() for p, name in names.items()}
        for key, state in self._optimizer.state.items():
            whose = names.get(key, "a parameter") if isinstance(key, Tensor) else str(key)
            tensors |= {f"{place} of {whose}": value for place, value in leaves(state) if place not in self._infinite}
        fine = torch.stack(
            [norm.isfinite().to(self._ranks.device) for norm in torch._foreach_norm(list(tensors.values()), torch.inf)]
        )
        mine = next((name for name, ok in zip(tensors, fine.tolist(), strict=True) if not ok), None)
        if found := next((name for name in self._ranks.gather(mine) if name), None):
            raise Diverged(f"step {self._step}: {found} holds numbers that are not finite; {_ADVICE}")

    def _send(self) -> None:
        """Start to copy this step's flags to the host."""
        assert self._flags is not None
        host = torch.empty(self._flags.shape, dtype=self._flags.dtype, pin_memory=True)
        host.copy_(self._flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._in_flight = self._step, host, arrived

    def _read(self) -> None:
        """Wait for the flags in flight, which belong to the last step. Raises Diverged if one is set."""
        if self._in_flight is None:
            return
        (step, flags, arrived), self._in_flight = self._in_flight, None
        arrived.synchronize()
        if flags.any():
            raise Diverged(f"{self._describe(step, flags)}; {_ADVICE}")

    def _describe(self, step: int, flags: Tensor) -> str:
        """Step, batch, and rank or layer."""
        lowest = flags.tolist()
        bad = [name for name, flag in zip(self._names, lowest, strict=True) if flag]
        # The backward pass runs from the last layer to the first, so the trouble began in the last bad layer.
        what = f"the gradient of {bad[-1]} is not finite"
        if lowest[0]:
            rank = self._ranks.size - lowest[0]
            what = "the loss is not finite" + (f" on rank {rank}" if self._ranks.size > 1 else "")
        first = step * self._batch_size
        return f"step {step}: {what} (batch {step}: sequences {first} to {first + self._batch_size - 1})"


_ADVICE = "continue from the last checkpoint with --resume auto, and a lower --lr or --on-nan skip"
