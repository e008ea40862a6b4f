"""DistributedDataParallel with gradient accumulation under `no_sync`, for every variant.

    torchrun --standalone --nproc_per_node=2 examples/ddp.py

The ranks share the optimizer's work: one rank keeps each matrix's momentum and computes its LMO, and every rank gets all
directions. In each pass only the last micro-batch reduces the gradients.

To save the optimizer, call `optimizer.full_state_dict()` on every rank and save what it returns on one.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from task import MICRO, OPTIMIZERS, STEPS, Net, batch, build, finish, leave
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel


def train(variant: str) -> tuple[list[float], list[Tensor], int]:
    """The losses of every step, the final weights, and how often gradients were reduced."""
    net = Net()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = build(variant, net)
    reductions = 0

    def counted(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal reductions
        reductions += bucket.is_last()
        return allreduce_hook(group, bucket)

    model.register_comm_hook(dist.group.WORLD, counted)
    losses = []
    for step in range(STEPS):
        x, y = (whole.chunk(dist.get_world_size())[dist.get_rank()] for whole in batch(step))
        micro_batches = list(zip(x.split(MICRO // 2), y.split(MICRO // 2), strict=True))

        def closure(micro_batches: list = micro_batches) -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for i, (x, y) in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with nullcontext() if last else model.no_sync():
                    loss = model(x, y) / len(micro_batches)
                    loss.backward()
                total += loss.detach()
            return total

        loss = optimizer.step(closure)
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    optimizer.flush()
    return losses, [p.detach() for p in net.parameters()], reductions


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {variant: train(variant) for variant in OPTIMIZERS}
    if dist.get_rank() == 0:
        finish({variant: (losses, weights) for variant, (losses, weights, _) in results.items()})
        print("reductions in", STEPS, "steps:", {variant: reductions for variant, (*_, reductions) in results.items()})
    leave()
