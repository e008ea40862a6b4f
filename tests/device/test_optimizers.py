"""The optimizers on the device: the formulas in float64, the polar factor in working precision, dtypes, no waiting."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from optim.polar import has_bfloat16_units, polar, work_dtype
from tests.helpers.device import CUDA, DEVICE, SIZE, TOY, distance, filled, gradients, groups, limit, tokens
from tests.helpers.optimizers import BETA, CLASSES, GAMMA, OPTIONS, Net, Q, all_classes, batch, make, variants
from tests.helpers.reference import trajectory

pytestmark = limit

STEPS = 12
NORM_OF = {(12, 8): "spectral", (8, 12): "spectral", (10, 10): "spectral", (9, 6): "sign", (7, 5): "colnorm", (11,): "rms"}


def loss_of(x: list[Tensor], k: int) -> Tensor:
    """A non-convex function of the weights and of batch k."""
    generator = torch.Generator().manual_seed(k)
    targets = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.device) for w in x]
    return sum((w - t).cosh().log().sum() + (w * t).sin().sum() for w, t in zip(x, targets, strict=True))


def gradient(x: list[Tensor], k: int, old: bool = False) -> list[Tensor]:
    x = [w.detach().clone().requires_grad_() for w in x]
    return list(torch.autograd.grad(loss_of(x, k), x))


@variants
def test_the_weights_are_those_of_the_formulas(variant):
    """On the device, against the plain formulas in float64 on the CPU."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in NORM_OF]
    rates = {"lr": lambda _: 0.02, "beta": lambda _: BETA, "gamma": lambda _: GAMMA, "q": lambda _: Q}
    norms = list(NORM_OF.values())
    right = trajectory(variant, start, gradient, range(STEPS), norms, [1.5] * len(start), decay=0.1, **rates)
    params = [nn.Parameter(w.clone().to(DEVICE)) for w in start]
    each = [{"params": [p], "norm": norm, "radius": 1.5} for p, norm in zip(params, norms, strict=True)]
    optimizer = CLASSES[variant](each, lr=0.02, momentum=BETA, weight_decay=0.1, polar="svd", **OPTIONS[variant])

    for k in range(STEPS):

        def closure(k: int = k) -> Tensor:
            loss = loss_of(params, k)
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.flush()
    assert max(map(distance, params, right[-1])) <= 1e-9


@all_classes
def test_the_device_and_the_cpu_agree(variant):
    """In float64, with AdamW's groups, a convolution and an embedding."""

    def walk(device: torch.device | str) -> list[Tensor]:
        net = Net().to(device)
        optimizer = make(variant, net, polar="svd")
        for k in range(6):

            def closure(k: int = k) -> Tensor:
                loss = net(batch(k).to(device))
                loss.backward()
                return loss

            optimizer.step(closure)
        optimizer.flush()
        return list(net.parameters())

    assert max(map(distance, walk(DEVICE), walk("cpu"))) <= 1e-9


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 1), (1, 4)])
def test_the_polar_factor_in_working_precision(rows, columns):
    """Against the same polynomials in float64, for the shapes of the model's matrices."""
    d = SIZE.d_model
    rows, columns = rows * d, columns * d
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(n, d, generator=generator).to(DEVICE))[0] for n in (rows, columns))
    m = (u * torch.logspace(0, -1.3, d, device=DEVICE)) @ v.T
    factor = polar(torch.stack([m, torch.zeros_like(m)]))
    assert factor.dtype == work_dtype(m, "polar_express")
    assert distance(factor[0], polar(m.double())) <= 2e-2
    values = torch.linalg.svdvals(factor[0].float())
    assert values.min() >= 0.7 and values.max() <= 1.25
    assert not factor[1].any(), "the factor of zero"
    for scale in (1e-30, 1e30):
        assert distance(polar(m * scale), factor[0]) <= 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@all_classes
def test_averages_are_in_float32_and_on_the_device(variant, dtype):
    net = Net().to(DEVICE, dtype)
    optimizer = make(variant, net)
    for k in range(3):

        def closure(k: int = k) -> Tensor:
            loss = net(batch(k).to(DEVICE))
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.flush()
    for p, state in optimizer.state.items():
        assert (p.dtype, p.device, bool(p.isfinite().all())) == (dtype, DEVICE, True)
        floats = {name: v for name, v in state.items() if isinstance(v, Tensor) and v.is_floating_point() and v.ndim}
        assert "momentum_buffer" in floats or "exp_avg_sq" in floats
        for name, value in floats.items():
            assert (value.device, value.dtype) == (DEVICE, torch.float32), name


def test_the_working_precision_is_bfloat16_only_with_units():
    wide = torch.zeros(128, 128, device=DEVICE)
    units = has_bfloat16_units(DEVICE)
    assert units == (torch.cuda.get_device_capability(DEVICE) >= (8, 0)) if CUDA else isinstance(units, bool)
    assert work_dtype(wide, "polar_express") == (torch.bfloat16 if units else torch.float32)
    assert work_dtype(wide, "svd") == torch.float32 and work_dtype(wide.double(), "polar_express") == torch.float64


class Reads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU; for a device that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero):
            self.found.append(str(function))
        return function(*arguments, **(options or {}))


def waits(act) -> list[str]:
    """Where the host waits for the device while `act` runs."""
    if not CUDA:
        with Reads() as reads:
            act()
        return reads.found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]


@variants
def test_a_step_never_waits_for_the_device(variant):
    model, some = filled(TOY), tokens(TOY, 2)
    optimizer = CLASSES[variant](groups(model), lr=1e-3, **OPTIONS[variant])
    for _ in range(2):  # the first steps make state
        optimizer.step(lambda: gradients(model, some, has_bfloat16_units(DEVICE)))
    assert waits(lambda: optimizer.step(lambda: gradients(model, some, has_bfloat16_units(DEVICE)))) == []


def test_a_wait_is_seen():
    some = torch.ones(3, device=DEVICE)
    assert waits(lambda: some.sum().item())
