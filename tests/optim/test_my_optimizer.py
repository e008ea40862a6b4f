"""examples/my_optimizer.py: its formula, two ranks under DDP and with FSDP2, and the trainer."""

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from optim import Gluon, GluonMVR1
from tests.helpers.ranks import Ranks
from tests.helpers.reference import lmo
from tests.helpers.train_runs import data, trainer  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import my_optimizer
import task


def train_mine(name, how, **options):
    """The weights after every step, in one process, under DDP or with FSDP2."""
    net = model = task.Net()
    if how == "ddp":
        model = DistributedDataParallel(net)
    elif how == "fsdp":
        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net)
    optimizer = getattr(my_optimizer, name)(task.groups(net), lr=0.05, momentum=0.9, **options)
    path = []
    for step in range(8):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        x, y = (whole.chunk(world)[rank] for whole in task.batch(step))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = model(x, y)
            loss.backward()
            return loss

        optimizer.step(closure)
        weights = [p.detach() for p in net.parameters()]
        path.append([w.full_tensor() if isinstance(w, DTensor) else w.clone() for w in weights])
    return path


MINE = {"TwoHorizons": {}, "HiddenMVR1": {"gamma": 0.2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", MINE)
def test_my_optimizer_on_two_ranks(name):
    alone = train_mine(name, "alone", **MINE[name])
    ranks = Ranks(2)
    for how in ("ddp", "fsdp"):
        for path in ranks.run(functools.partial(train_mine, name, how, **MINE[name])):
            for mine, right in zip(path, alone, strict=True):
                for a, b in zip(mine, right, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    ranks.stop()


def test_two_horizons_is_its_formula():
    net = task.Net()
    norms = ["sign" if "head" in n else "rms" if "bias" in n else "spectral" for n, _ in net.named_parameters()]
    sums = [[0.0, 0.0] for _ in norms]
    for k, after in enumerate(train_mine("TwoHorizons", "alone", polar="svd")):
        gradients = torch.autograd.grad(net(*task.batch(k)), list(net.parameters()))
        for i, (p, g, norm) in enumerate(zip(net.parameters(), gradients, norms, strict=True)):
            sums[i] = [beta * old + (1 - beta) * g for beta, old in zip((0.9, 0.99), sums[i], strict=True)]
            fast, slow = sums[i][0] / (1 - 0.9 ** (k + 1)), sums[i][1] / (1 - 0.99 ** (k + 1))
            with torch.no_grad():
                p += 0.05 * (2.0 if norm == "sign" else 1.0) * lmo(fast + 0.5 * slow, norm)
        for mine, right in zip(after, net.parameters(), strict=True):
            torch.testing.assert_close(mine, right.detach(), rtol=1e-9, atol=1e-9)


def test_hidden_mvr1_corrects_only_hidden_layers():
    def train(kind, norm):
        net = task.Net()
        optimizer = kind(net.parameters(), lr=0.05, norm=norm)

        def closure():
            loss = net(*task.batch(optimizer.updates))
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        optimizer.flush()
        return list(net.parameters())

    for norm, same, other in (("sign", Gluon, GluonMVR1), ("auto", GluonMVR1, Gluon)):
        mine = train(my_optimizer.HiddenMVR1, norm)
        assert all(map(torch.equal, mine, train(same, norm)))
        assert not any(map(torch.equal, mine, train(other, norm)))


@pytest.mark.parametrize("option", [{"slow": 1.0}, {"alpha": -1.0}])
def test_an_option_of_mine_is_checked(option):
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"{name} must be"):
        my_optimizer.TwoHorizons(task.Net().parameters(), norm="auto", **option)


@pytest.mark.slow
@pytest.mark.parametrize("mine", ['TwoHorizons --optimizer-options {"slow":0.95}', "HiddenMVR1"])
def test_my_optimizer_in_the_trainer(trainer, mine):  # noqa: F811
    """With the command of its docstring: the same weights on two ranks, and exactly the same after a resume."""
    options, name = f"--optimizer examples.my_optimizer:{mine}", mine.split()[0]
    alone = trainer.run(f"{name}-1", options).ok()
    two = trainer.run(f"{name}-2", options, ranks=2).ok()
    for key, right in alone.weights.items():
        assert abs(two.weights[key] - right).max() <= 1e-9 * abs(right).max(), key
    trainer.run(f"{name}-3", f"{options} --steps 4", ranks=2).ok()
    trainer.run(f"{name}-3", f"{options} --resume auto", ranks=2).ok().same_as(two)
