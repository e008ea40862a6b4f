"""What the examples train: a small network on made-up data, in float64 so that trajectories can be compared."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed if `optim` is installed
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR

STEPS, ROWS, MICRO = 20, 16, 8  # steps, samples of a batch, samples of a micro-batch
OPTIMIZERS = {
    "gluon": (Gluon, {}),
    "mvr1": (GluonMVR1, {"gamma": 0.2}),
    "mvr2": (GluonMVR2, {"q": 0.5}),
    "mvr3": (GluonMVR3, {"q": 0.5, "gamma": 0.2}),
    "single_batch": (SingleBatchMVR, {"gamma": 0.2}),
    "previous_batch": (PreviousBatchMVR, {"gamma": 0.2}),
}
ONE_PASS = [name for name, (kind, _) in OPTIMIZERS.items() if kind.passes == 1]
TWO_PASSES = [name for name, (kind, _) in OPTIMIZERS.items() if kind.passes == 2]


class Net(nn.Module):
    """`net(x, y)` is the mean loss; the weights are the same in every process."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 4, bias=False)
        self.double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / p.shape[-1] ** 0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (self.head(x) - y).square().mean()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The inputs and noisy targets of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, noise = (torch.randn(ROWS, columns, generator=generator, dtype=torch.float64) for columns in (8, 4))
    return x, torch.sin(2 * x[:, :4]) + x[:, 4:] / 2 + noise / 2


def build(variant: str, net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """An optimizer for a (wrapped or sharded) Net."""
    kind, own = OPTIMIZERS[variant]
    return kind(groups(net), lr=0.05, momentum=0.9, **own, **options)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    """Spectral balls for matrices and rms for biases (what `auto` chooses by shape), a sign ball for the head."""
    head = [p for name, p in net.named_parameters() if "head" in name]
    others = [p for name, p in net.named_parameters() if "head" not in name]
    return [{"params": others, "norm": "auto"}, {"params": head, "norm": "sign", "radius": 2.0}]


def finish(runs: Mapping[str, tuple[Sequence[float], Sequence[Tensor]]]) -> None:
    """Print the losses of the runs. With --save FILE, also save them and the final weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", metavar="FILE")
    if path := parser.parse_args().save:
        torch.save({name: (list(losses), list(weights)) for name, (losses, weights) in runs.items()}, path)
    for name, (losses, _) in runs.items():
        print(f"{name}: loss {sum(losses[:5]) / 5:.3f} in the first five steps, {sum(losses[-5:]) / 5:.3f} in the last five")


def leave() -> None:
    """Leave the process group, if there is one, and end the process without the interpreter's shutdown.

    `destroy_process_group` joins gloo's threads only if nothing else holds the group. DTensor's caches hold it, and so does
    torch._dynamo if imported late. A thread that frees its last tensor during the shutdown aborts the process.
    """
    if dist.is_initialized():
        dist.barrier()  # no rank closes its connections while another still needs them
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)
