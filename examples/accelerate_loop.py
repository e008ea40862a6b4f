"""Hugging Face's `accelerate` with MVR-2 and MVR-3: the closure is called twice.

    pip install accelerate
    python examples/accelerate_loop.py                                    or: accelerate launch, torchrun

The closure holds the loop over micro-batches, so `accelerator.accumulate` is not used (inside it, a gradient would lie in
.grad when `step` begins, which raises a RuntimeError). Only a pass's last micro-batch reduces over the ranks; MVR-2 even
needs only one reduction for both passes. With fp16 the scaler calls a bare step(): use bf16.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator, PartialState
from task import MICRO, ROWS, STEPS, Net, batch, build, finish, leave
from torch import Tensor


def samples(accelerator: Accelerator) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every batch."""
    for step in range(STEPS):
        x, y = batch(step)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        yield x[mine].to(accelerator.device), y[mine].to(accelerator.device)


def train(variant: str) -> tuple[list[float], list[Tensor]]:
    """The losses of every step (at the weights that the model then holds), and the final weights."""
    accelerator = Accelerator(cpu=True)
    net = Net()
    model = accelerator.prepare_model(net)
    optimizer = accelerator.prepare_optimizer(build(variant, net))
    losses = []
    for x, y in samples(accelerator):
        micro = len(x) * MICRO // ROWS

        def closure(reduce: bool = True, x: Tensor = x, y: Tensor = y, micro: int = micro) -> Tensor:
            total = torch.zeros((), dtype=x.dtype, device=x.device)
            for start in range(0, len(x), micro):
                last = start + micro >= len(x)
                with nullcontext() if reduce and last else accelerator.no_sync(model):
                    loss = model(x[start : start + micro], y[start : start + micro]) * micro / len(x)
                    accelerator.backward(loss)
                total += loss.detach()
            return total

        # `optimizer.step(closure)` does as well, but gives no loss back and reduces twice.
        loss = optimizer.optimizer.step(closure, partial(closure, reduce=variant != "mvr2"))
        losses.append(accelerator.reduce(loss, "mean").item())
    optimizer.optimizer.flush()
    return losses, [p.detach() for p in net.parameters()]


if __name__ == "__main__":
    runs = {variant: train(variant) for variant in ("mvr2", "mvr3")}
    if PartialState().is_main_process:
        finish(runs)
    leave()
