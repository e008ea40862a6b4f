"""FSDP2 (`fully_shard`) with gradient accumulation, for every variant.

    torchrun --standalone --nproc_per_node=2 examples/fsdp2.py

Give the optimizer the sharded parameters: build it after `fully_shard`. Momentum is sharded like its parameter. Each pass must
reduce gradients at its last micro-batch. If it does not, .grad is empty, and the optimizer raises a RuntimeError. Save with
torch.distributed.checkpoint, or call `optimizer.full_state_dict()` on every rank and save what it returns on one.
"""

import torch
import torch.distributed as dist
from task import MICRO, OPTIMIZERS, STEPS, Net, batch, build, finish, leave
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def train(variant: str, reduce: bool = True) -> tuple[list[float], list[Tensor]]:
    """The losses of every step, and the final weights, gathered."""
    net = Net()
    for layer in net.layers:
        fully_shard(layer)
    fully_shard(net)
    optimizer = build(variant, net)
    assert all(isinstance(s["momentum_buffer"], DTensor) for s in optimizer.state.values())
    losses = []
    for step in range(STEPS):
        x, y = (whole.chunk(dist.get_world_size())[dist.get_rank()] for whole in batch(step))
        micro_batches = list(zip(x.split(MICRO // 2), y.split(MICRO // 2), strict=True))

        def closure(micro_batches: list = micro_batches) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for i, (x, y) in enumerate(micro_batches):
                net.set_requires_gradient_sync(reduce and i == len(micro_batches) - 1)
                loss = net(x, y) / len(micro_batches)
                loss.backward()
                total += loss.detach()
            return total

        loss = optimizer.step(closure)
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    optimizer.flush()
    return losses, [p.detach().full_tensor() for p in net.parameters()]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {variant: train(variant) for variant in OPTIMIZERS}
    try:
        train("mvr2", reduce=False)
    except RuntimeError as error:
        refused = str(error)
    if dist.get_rank() == 0:
        finish(results)
        print("a pass that reduces nothing is refused:", refused)
    leave()
