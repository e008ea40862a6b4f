"""Bad arguments: each raises an exception that names the argument, the value and the allowed values."""

import math

import pytest
import torch
from torch import nn

from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, PreviousBatchMVR, SingleBatchMVR
from tests.helpers.optimizers import CLASSES, Net, train

NAN, INF = math.nan, math.inf
NON_NEGATIVE = (-1, -1e-9, NAN, INF, -INF, "0.1", None, True, [0.1], torch.ones(2), 1j)
BAD = [
    *[("lr", v, "≥ 0") for v in NON_NEGATIVE],
    *[("momentum", v, r"\[0, 1\)") for v in (-0.1, 1, 1.0, 2, NAN, INF, "0.9", None, False)],
    *[("weight_decay", v, "≥ 0") for v in (-0.1, NAN, INF, "0", None, True)],
    *[("radius", v, "> 0") for v in (0, -1, NAN, INF, "1", None, True)],
    *[("norm", v, "one of spectral, sign") for v in ("Spectral", "l2", "", None, 2, ["sign"])],
    *[("scale", v, "one of scion, muon, moonlight, none") for v in ("spectral", None, 1.0, "Muon")],
    *[("polar", v, "one of polar_express, newton_schulz, svd") for v in ("ns", None, 5, "SVD")],
    *[("bias_correction", v, "True or False") for v in (0, 1, None, "yes", 0.5)],
]
BAD_ADAMW = [
    *[("eps", v, "≥ 0") for v in (-1e-8, NAN, INF, "0", None, True)],
    *[("betas", v, r"two numbers in \[0, 1\)") for v in (0.9, (0.9,), (0.9, 1), (-0.1, 0.9), ("a", 0), None, (0.9, NAN), "ab")],
]


def square():
    return nn.Parameter(torch.ones(2, 2))


def assert_names(error, name, value, allowed):
    assert error.match(rf"^{name}.* must be .*{allowed}")
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name, value, allowed", BAD, ids=lambda v: repr(v)[:20])
def test_bad_arguments(name, value, allowed):
    with pytest.raises(ValueError) as error:
        Gluon([square()], **{name: value})
    assert_names(error, name, value, allowed)
    optimizer = GluonMVR2([square()])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [square()], name: value})
    assert_names(error, name, value, allowed)
    assert len(optimizer.param_groups) == 1, "a refused group is not added"
    assert len(optimizer.state) == 1


@pytest.mark.parametrize("name, value, allowed", BAD_ADAMW, ids=lambda v: repr(v)[:20])
def test_bad_arguments_of_adamw_groups(name, value, allowed):
    with pytest.raises(ValueError) as error:
        Gluon([square()], norm="adamw", **{name: value})
    assert_names(error, name, value, allowed)
    optimizer = GluonMVR2([square()])
    with pytest.raises(ValueError) as error:
        optimizer.add_param_group({"params": [square()], "norm": "adamw", name: value})
    assert_names(error, name, value, allowed)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [-0.1, NAN, INF, "0.1", None, True])
@pytest.mark.parametrize("cls", [GluonMVR1, GluonMVR3, SingleBatchMVR, PreviousBatchMVR])
def test_bad_gamma(cls, value):
    with pytest.raises(ValueError) as error:
        cls([square()], gamma=value)
    assert_names(error, "gamma", value, "≥ 0")


@pytest.mark.parametrize("value", [0, -0.1, 1.1, NAN, "0.5", True, None])
@pytest.mark.parametrize("cls", [GluonMVR2, GluonMVR3])
def test_bad_q(cls, value):
    with pytest.raises(ValueError) as error:
        cls([square()], q=value)
    assert_names(error, "q", value, r"\(0, 1\]")


@pytest.mark.parametrize(
    "cls, option",
    [
        (Gluon, "gamma"), (Gluon, "q"), (Gluon, "nesterov"), (GluonMVR1, "q"), (GluonMVR2, "gamma"), (SingleBatchMVR, "q"),
        (PreviousBatchMVR, "q"), (GluonMVR2, "inner"), (GluonMVR3, "overlap"), (GluonMVR3, "correction_fraction"),
    ],
)  # fmt: skip
def test_options_of_another_variant(cls, option):
    with pytest.raises(TypeError, match=rf"{cls.__name__}.*{option}"):
        cls([square()], **{option: 0.5})


@pytest.mark.parametrize("norm", ["spectral", "colnorm", "rownorm"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_vectors_in_a_matrix_norm(norm, shape):
    with pytest.raises(ValueError, match=rf"norm='{norm}' needs .*2 dimensions.*shape \({', '.join(map(str, shape))}"):
        Gluon([nn.Parameter(torch.ones(shape))], norm=norm)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_parameters_that_are_not_real(dtype):
    with pytest.raises(ValueError, match=rf"params must be real floating-point tensors.*{dtype}"):
        Gluon([torch.ones(2, 2, dtype=dtype)])


@pytest.mark.parametrize("variant", CLASSES)
def test_parameters_that_are_no_leaves_or_no_tensors(variant):
    with pytest.raises(ValueError, match="leaf"):
        CLASSES[variant]([square() * 2])
    with pytest.raises(TypeError):
        CLASSES[variant]([1.0])
    with pytest.raises(TypeError, match="ordered"):
        CLASSES[variant]([{"params": {square()}}])
    with pytest.raises(ValueError, match="empty"):
        CLASSES[variant]([])


def test_a_parameter_twice():
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"params must name every parameter once.*\(2, 3\)"):
        Gluon([p, q, p])
    with pytest.raises(ValueError, match=r"params must name every parameter once.*\(2, 3\)"):
        Gluon([{"params": [p, q]}, {"params": [p]}])
    optimizer = Gluon([p])
    with pytest.raises(ValueError, match="params must name every parameter once"):
        optimizer.add_param_group({"params": p})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("variant", CLASSES)
def test_good_extremes(variant):
    """Values at the edge of what is allowed work."""
    net = Net()
    options = {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0}
    if variant in ("mvr1", "mvr3", "single_batch", "previous_batch"):
        options["gamma"] = 0
    if variant in ("mvr2", "mvr3"):
        options["q"] = 1
    optimizer = CLASSES[variant](net.groups(), **options)
    path = train(net, optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(path[0], path[-1], strict=True)), "lr 0 moves nothing"
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = 0.01, 0.999999
    assert all(w.isfinite().all() for w in train(net, optimizer, range(3))[-1])
