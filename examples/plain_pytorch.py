"""A plain PyTorch loop: the same few lines for every variant.

    python examples/plain_pytorch.py

A step is `optimizer.step(closure)`. The closure is an ordinary one: it zeroes the gradients, evaluates the loss of the batch,
calls backward() and returns the loss. MVR-1, -2, -3 and PreviousBatchMVR call it twice a step, each time at other weights.
Gluon and SingleBatchMVR need one gradient, so the usual backward() and a bare step() work too. `step` leaves .grad empty.
"""

from typing import Any

from task import OPTIMIZERS, STEPS, Net, batch, build, finish
from torch import Tensor


def train(variant: str, **options: Any) -> tuple[list[float], list[Tensor]]:
    """The losses of every step, and the final weights."""
    net = Net()
    optimizer = build(variant, net, **options)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = net(x, y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    optimizer.flush()  # MVR-1, -2 and -3 hold their last update back
    return losses, [p.detach() for p in net.parameters()]


def train_with_bare_step(variant: str) -> tuple[list[float], list[Tensor]]:
    """The loop of most existing code. Variants with two passes raise a TypeError."""
    net = Net()
    optimizer = build(variant, net)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = net(*batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach() for p in net.parameters()]


if __name__ == "__main__":
    finish({variant: train(variant) for variant in OPTIMIZERS})
