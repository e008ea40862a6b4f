"""Hugging Face's `accelerate` with the variants that evaluate each batch twice.

    pip install accelerate
    python examples/accelerate_loop.py                                    or: accelerate launch, torchrun

The closure holds the loop over the micro-batches. Do not use `accelerator.accumulate` around it: the optimizer drops what is in
.grad when a pass begins, so earlier micro-batches would not count. The last micro-batch of a pass reduces the gradients over
the ranks. With fp16, accelerate's scaler calls a bare step(); use bf16.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator, PartialState
from task import MICRO, ROWS, STEPS, TWO_PASSES, Net, batch, build, finish, leave
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

        def closure(x: Tensor = x, y: Tensor = y, micro: int = micro) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=x.dtype, device=x.device)
            for start in range(0, len(x), micro):
                last = start + micro >= len(x)
                with nullcontext() if last else accelerator.no_sync(model):
                    loss = model(x[start : start + micro], y[start : start + micro]) * micro / len(x)
                    accelerator.backward(loss)
                total += loss.detach()
            return total

        loss = optimizer.optimizer.step(closure)  # accelerate's own step(closure) works as well, but returns no loss
        losses.append(accelerator.reduce(loss, "mean").item())
    optimizer.optimizer.flush()
    return losses, [p.detach() for p in net.parameters()]


if __name__ == "__main__":
    runs = {variant: train(variant) for variant in TWO_PASSES}
    if PartialState().is_main_process:
        finish(runs)
    leave()
