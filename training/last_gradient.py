"""The extra pass of MuonMVR: the gradient that the next step compares with, as in MUON-MVR's README."""

from collections.abc import Callable

import torch
from torch import Tensor

from data.loader import BatchLoader
from optim import MuonMVR

Batch = tuple[Tensor, Tensor]


class LastGradient:
    """Hands MuonMVR, before each step, the gradient of the previous batch at these weights or of this batch at the previous
    weights.

    `gradients` leaves the gradient of a batch in `.grad`. The previous weights live in the optimizer's state, so checkpoints
    keep them.
    """

    def __init__(
        self, optimizer: MuonMVR, compare_with: str, loader: BatchLoader, gradients: Callable[[Batch], object]
    ) -> None:
        self._optimizer, self._loader, self._gradients = optimizer, loader, gradients
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._previous_batch: Batch | None = None
        self._keeps_weights = compare_with == "previous_weights"
        if self._keeps_weights:
            for p in self._params:
                optimizer.state[p]["previous_weights"] = p.detach().clone()

    def before_step(self, step: int, batch: Batch) -> None:
        """Call this before each step. It takes no pass before step 0, which has nothing to compare with."""
        previous, self._previous_batch = self._previous_batch, batch  # even if the pass below raises
        if self._keeps_weights:
            self._at_previous_weights(step, batch)
        elif step > 0:
            self._gradients(previous or self._loader.batch(step - 1))  # None after a resume
            self._optimizer.update_last_grad()

    def _at_previous_weights(self, step: int, batch: Batch) -> None:
        present = [p.detach().clone() for p in self._params]
        previous = [self._optimizer.state[p]["previous_weights"] for p in self._params]
        if step > 0:
            self._set_weights(previous)
            try:
                self._gradients(batch)
            finally:
                self._set_weights(present)
            self._optimizer.update_last_grad()
        torch._foreach_copy_(previous, present)

    @torch.no_grad()
    def _set_weights(self, weights: list[Tensor]) -> None:
        torch._foreach_copy_(self._params, weights)
