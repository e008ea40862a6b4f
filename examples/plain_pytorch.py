"""A plain PyTorch loop: one line for every variant.

    python examples/plain_pytorch.py

A step is `optimizer.step(closure)`. The closure evaluates the loss of the batch and calls backward(); it zeroes nothing,
since MVR-2 and MVR-3 call it twice and add or compare the gradients. Gluon and MVR-1 need only one gradient, so they also
take the usual backward() and a bare step(). `step` leaves no gradient behind: zero_grad() is not needed.
"""

from typing import Any

from task import STEPS, Net, batch, build, finish
from torch import Tensor


def train(variant: str, **options: Any) -> tuple[list[float], list[Tensor]]:
    """The losses of every step, and the final weights."""
    net = Net()
    optimizer = build(variant, net, **options)
    losses = []
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = net(x, y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    optimizer.flush()  # MVR-2 holds its last update back
    return losses, [p.detach() for p in net.parameters()]


def train_with_bare_step(variant: str) -> tuple[list[float], list[Tensor]]:
    """The loop that existing code has. MVR-2 and MVR-3 refuse it with a TypeError."""
    net = Net()
    optimizer = build(variant, net)
    losses = []
    for step in range(STEPS):
        loss = net(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [p.detach() for p in net.parameters()]


if __name__ == "__main__":
    finish({variant: train(variant) for variant in ("gluon", "mvr1", "mvr2", "mvr3")})
