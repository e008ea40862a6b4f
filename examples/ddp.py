"""DistributedDataParallel with gradient accumulation under `no_sync`, for every variant.

    torchrun --standalone --nproc_per_node=2 examples/ddp.py

Each matrix's momentum and LMO live on one rank; the directions are broadcast. Only the last micro-batch of a pass reduces.
For MVR-2 the pass at the previous weights need not reduce at all: its gradient stays in .grad, the second pass adds to it,
and one reduction takes both. MVR-3 subtracts that gradient from the momentum at once, so it must be reduced.
"""

from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from task import MICRO, STEPS, Net, batch, build, finish, leave
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

        def closure(reduce: bool = True, micro_batches: list = micro_batches) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for i, (x, y) in enumerate(micro_batches):
                last = i == len(micro_batches) - 1
                with nullcontext() if reduce and last else model.no_sync():
                    loss = model(x, y) / len(micro_batches)
                    loss.backward()
                total += loss.detach()
            return total

        loss = optimizer.step(closure, partial(closure, reduce=variant != "mvr2"))
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    optimizer.flush()
    return losses, [p.detach() for p in net.parameters()], reductions


if __name__ == "__main__":
    dist.init_process_group("gloo")
    results = {variant: train(variant) for variant in ("gluon", "mvr1", "mvr2", "mvr3")}
    if dist.get_rank() == 0:
        finish({variant: (losses, weights) for variant, (losses, weights, _) in results.items()})
        print("reductions in", STEPS, "steps:", {variant: reductions for variant, (*_, reductions) in results.items()})
    leave()
