"""Every scheduler of torch works with every class, with the learning rate as a number and as a tensor."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from tests.helpers.optimizers import VARIANTS, Net, all_classes, closure_of, distance, make, same, train, weights

STEPS = 6


def sequential(o):
    parts = [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    return lr_scheduler.SequentialLR(o, parts, milestones=[3])


def chained(o):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.8)])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.05, 2, base_momentum=0.7, max_momentum=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=STEPS + 2),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, 4),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
}


def scheduled(variant, build, lr):
    """The weights, and the lr and momentum of each step and group, under a scheduler."""
    net = Net()
    optimizer = make(variant, net, lr=lr)
    for group in optimizer.param_groups:  # a scheduler that multiplies in place would change a shared tensor twice
        group["lr"] = copy.copy(lr) if isinstance(lr, float) else lr.clone()
    schedule = build(optimizer)
    settings = []
    for k in range(STEPS):
        settings.append([(float(g["lr"]), g["momentum"]) for g in optimizer.param_groups])
        optimizer.step(closure_of(net, k))
        schedule.step(*[float(k)] * isinstance(schedule, lr_scheduler.ReduceLROnPlateau))
    optimizer.flush()
    return weights(net), settings


def by_hand(variant, settings):
    """The same run with the settings written into the groups by hand."""
    net = Net()
    optimizer = make(variant, net, lr=0.02)
    for k, row in enumerate(settings):
        for group, (lr, momentum) in zip(optimizer.param_groups, row, strict=True):
            group["lr"], group["momentum"] = lr, momentum
        optimizer.step(closure_of(net, k))
    optimizer.flush()
    return weights(net)


def of_sgd(build, lr):
    """The lr and momentum of each step of torch's SGD under a scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=lr, momentum=0.8)
    schedule, settings = build(optimizer), []
    for k in range(STEPS):
        settings.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        schedule.step(*[float(k)] * isinstance(schedule, lr_scheduler.ReduceLROnPlateau))
    return settings


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    """Every class takes each step with the scheduler's values at that step, which agree with those for torch's SGD."""
    expected = of_sgd(SCHEDULERS[name], 0.02)
    tensor_lr = torch.tensor(0.02, dtype=torch.float64)
    tensor_expected = of_sgd(SCHEDULERS[name], tensor_lr.clone())  # torch 2.9's SequentialLR gives other values for a tensor
    assert len({lr for lr, _ in expected}) > 1, "the schedule moves"
    for variant in ("gluon", "mvr3", "previous_batch", "muon_mvr"):  # every order of passes, and MuonMVR's interface
        end, settings = scheduled(variant, SCHEDULERS[name], 0.02)
        assert all(pair == row_pair for pair, row in zip(expected, settings, strict=True) for row_pair in row), variant
        assert same(end, by_hand(variant, settings)), variant
        tensor_end, tensor_settings = scheduled(variant, SCHEDULERS[name], tensor_lr)
        assert torch.allclose(torch.tensor(tensor_settings), torch.tensor(tensor_expected)[:, None], rtol=1e-6), variant
        assert distance(tensor_end, by_hand(variant, tensor_settings)) < 1e-6, variant


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@all_classes
def test_cycles_move_the_momentum(variant, name):
    """torch cycles `betas` instead of the momentum if the defaults have them, so ours must not."""
    net = Net()
    optimizer = make(variant, net)
    assert "betas" not in optimizer.defaults
    assert [("betas" in g) for g in optimizer.param_groups] == [g["norm"] == "adamw" for g in optimizer.param_groups]
    schedule = SCHEDULERS[name](optimizer)
    moved = []
    for k in range(4):
        moved.append(optimizer.param_groups[0]["momentum"])
        optimizer.step(closure_of(net, k))
        schedule.step()
    assert moved[0] != moved[1] != moved[2]


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "gluon"])
def test_gamma_and_q_can_be_scheduled(variant):
    """A value written into the groups before a step is used in it (test_optim_reference.py checks the results)."""
    for option, value in VARIANTS[variant].keywords.items():
        nets, ends = (Net(), Net()), []
        for net, scheduled_value in zip(nets, (value, value / 2), strict=True):
            optimizer = make(variant, net)
            for group in optimizer.param_groups:
                group[option] = scheduled_value
            ends.append(train(net, optimizer, range(3))[-1])
        assert distance(*ends) > 1e-5, option
