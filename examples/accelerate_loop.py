"""Hugging Face's `accelerate` with the variants that evaluate each batch twice.

    pip install accelerate
    python examples/accelerate_loop.py                                    or: accelerate launch, torchrun

The closure holds the loop over the micro-batches. Do not use `accelerator.accumulate` around it: the optimizer drops what is in
.grad when a pass begins, so earlier micro-batches would not count. The last micro-batch of a pass reduces the gradients over
the ranks. Use bf16, not fp16: accelerate's scaler has no use for a closure.

Under DDP each rank keeps a share of the momentum, so `accelerator.save_state` raises a RuntimeError. `save` below saves
`full_state_dict()` instead, which resumes on any number of ranks.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from task import MICRO, ROWS, STEPS, TWO_PASSES, Net, batch, build, finish, leave
from torch import Tensor


def samples(accelerator: Accelerator) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of every batch."""
    for step in range(STEPS):
        x, y = batch(step)
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        yield x[mine].to(accelerator.device), y[mine].to(accelerator.device)


def save(accelerator: Accelerator, net: Net, optimizer: AcceleratedOptimizer, file: str) -> None:
    """Save the weights and the whole momentum."""
    state = {"weights": net.state_dict(), "optimizer": optimizer.optimizer.full_state_dict()}  # a collective
    accelerator.save(state, file)  # on the first rank alone


def train(
    variant: str, accelerator: Accelerator | None = None, save_to: str = "", resume: str = ""
) -> tuple[list[float], list[Tensor]]:
    """The losses of every step (at the weights that the model then holds), and the final weights.

    `save_to`: a file for the state after half of the steps. `resume`: go on from such a file.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    if accelerator.scaler is not None:
        raise ValueError("mixed_precision must not be fp16: a scaled loss needs a bare step(), use bf16")
    net = Net()
    model = accelerator.prepare_model(net)
    optimizer = accelerator.prepare_optimizer(build(variant, net))
    losses, done = [], 0
    if resume:
        saved, done = torch.load(resume, weights_only=True), STEPS // 2
        net.load_state_dict(saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
    for step, (x, y) in enumerate(samples(accelerator)):
        if step < done:
            continue
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
        if save_to and step + 1 == STEPS // 2:
            save(accelerator, net, optimizer, save_to)
    optimizer.optimizer.flush()
    return losses, [p.detach() for p in net.parameters()]


if __name__ == "__main__":
    runs = {variant: train(variant) for variant in TWO_PASSES}
    if PartialState().is_main_process:
        finish(runs)
    leave()
