"""The memory of a step: the weights, the momentum (and d), one gradient, and one bucket in flight."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from optim import buckets
from tests.helpers.optimizers import ALL, VARIANTS, make, two_passes


class Census(TorchDispatchMode):
    """`peak`: the most bytes alive at once among `tensors` and the tensors computed inside. `now()`: those still alive."""

    def __init__(self, tensors):
        super().__init__()
        self.peak, self._alive = 0, {}
        self._count(tensors)

    def _count(self, tensors):
        for t in tensors:
            storage = t.untyped_storage()
            reference = StorageWeakRef(storage)
            self._alive[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, self.now())

    def now(self):
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self._count(t for t in tree_iter(result) if isinstance(t, Tensor))
        return result


LAYERS = 8


def memory(variant, norm, shape):
    """(peak during a step, held after it), in units of the bytes of all weights."""
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(*shape[:: (-1) ** i], bias=False) for i in range(LAYERS)])
    if variant == "muon_mvr":
        optimizer = make(variant, net)
    else:
        optimizer = VARIANTS[variant](net.parameters(), norm=norm)

    def closure():
        x = torch.ones(1, shape[0])
        for layer in net:
            x = layer(x)
        x.sum().backward()

    for _ in range(2):
        optimizer.step(closure)
    unit = sum(p.nbytes for p in net.parameters())
    held = [*net.parameters(), *(t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor))]
    with Census(held) as census:
        optimizer.step(closure)
        after = census.now()
    assert after == sum(t.untyped_storage().nbytes() for t in held), "nothing else is left of a step"
    return census.peak / unit, after / unit


def buffers(variant, norm):
    """The number of buffers: M, and d or AdamW's second moment or MuonMVR's last gradient."""
    return 2 if norm == "adamw" or variant in ("mvr2", "mvr3", "muon_mvr") else 1


@pytest.mark.parametrize("norm", ["spectral", "sign", "colnorm", "frobenius", "adamw"])
def test_no_variant_needs_more_than_its_buffers_and_one_gradient(norm, monkeypatch):
    """Measured with one parameter per bucket, so that only weights, buffers and one gradient are large."""
    monkeypatch.setattr(buckets, "CPU_BUCKET_ELEMENTS", 1)
    for variant in VARIANTS:
        peak, held = memory(variant, norm, (64, 192))
        assert held == 1 + buffers(variant, norm), variant
        # The gradient, and a few temporaries of one parameter.
        assert peak <= held + 1 + 5.1 / LAYERS, f"{variant}: {peak} at its peak, {held} held"


@pytest.mark.parametrize("norm", ["spectral", "sign", "adamw"])
def test_two_passes_cost_no_memory(norm):
    """Their peak is that of Gluon, with the default buckets."""
    peak, held = memory("gluon", norm, (64, 64))
    for variant in ("mvr1", "mvr2", "mvr3", "previous_batch"):
        other_peak, other_held = memory(variant, norm, (64, 64))
        assert other_peak - other_held <= peak - held + 0.01, variant  # some activations


def test_muon_mvr_keeps_one_gradient_more():
    _, held = memory("muon_mvr", "spectral", (64, 64))
    assert held == 3


@pytest.fixture
def only_new_objects():
    """Python's collector lists only objects made in the test, not the hundreds of thousands from before."""
    gc.freeze()
    yield
    gc.unfreeze()


def parameter_sized(shape):
    """How many tensors of this shape are alive, as far as Python knows."""
    return sum(type(o) in (Tensor, nn.Parameter) and o.shape == shape for o in gc.get_objects())


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.usefixtures("only_new_objects")
def test_live_tensors_between_steps(variant):
    """A second count: there is no copy of weights or gradients."""
    shape = torch.Size((17, 23))
    p = nn.Parameter(torch.ones(shape))
    optimizer = make(variant, nn.ParameterList([p])) if variant == "muon_mvr" else VARIANTS[variant]([p])
    for _ in range(3):
        optimizer.step(lambda: (p * torch.arange(23)).square().sum().backward())
        assert parameter_sized(shape) == 1 + buffers(variant, "spectral")


@two_passes
@pytest.mark.usefixtures("only_new_objects")
def test_passes_share_one_gradient(variant):
    """When a pass begins, the other pass's gradient is no longer alive."""
    shape = torch.Size((19, 29))
    p = nn.Parameter(torch.ones(shape))
    optimizer = VARIANTS[variant]([p])
    found = []

    def closure():
        found.append(parameter_sized(shape))
        (p * torch.arange(29)).square().sum().backward()

    for _ in range(3):
        optimizer.step(closure)
    assert set(found) == {1 + buffers(variant, "spectral")}
