"""Properties of the norm balls and of the polar factor, on matrices of many shapes, ranks, dtypes and scales."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr

import optim.polar
from optim import Gluon
from optim.norms import NORMS, SCALES, VIEWS, get_norm, spectral_factor
from optim.polar import METHODS, has_bfloat16_units, polar, work_dtype

settings.register_profile("optim", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("optim")

# The error of one rounding to the dtype, or of an exact algorithm in it.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 12)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(1, 50), (50, 1), (1, 1), (1500, 2), (2, 1500)]),
)


def gaussian(shape, seed=0, rank=None, dtype=torch.float64) -> Tensor:
    """A random tensor, as a matrix of at most this rank."""
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(shape, dtype=torch.float64, generator=generator)
    if rank is not None and len(shape) > 1:
        columns = math.prod(shape[1:])
        m = torch.randn(shape[0], rank, dtype=torch.float64, generator=generator)
        m = (m @ torch.randn(rank, columns, dtype=torch.float64, generator=generator)).reshape(shape)
    return m.to(dtype)


@st.composite
def tensors(draw, dtypes=tuple(ROUNDING), vectors=False):
    shapes = st.one_of(SHAPES, st.tuples(st.integers(1, 20)), st.just(())) if vectors else SHAPES
    rank = draw(st.one_of(st.none(), st.integers(1, 3)))
    return gaussian(draw(shapes), draw(st.integers(0, 10**6)), rank, draw(st.sampled_from(dtypes)))


def inner(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def exact(name, m, scale="scion", view="convolution"):
    return get_norm(name, m.shape, scale, "svd", view=view)


names = pytest.mark.parametrize("name", NORMS)
MATRIX_NORMS = ("spectral", "colnorm", "rownorm")
views = st.sampled_from(VIEWS)


# ---- the LMO --------------------------------------------------------------------------------------------------------------


@names
@given(data=st.data())
def test_lmo_attains_the_dual_norm_inside_the_ball(name, data):
    m = data.draw(tensors(vectors=name not in MATRIX_NORMS))
    norm = exact(name, m, data.draw(st.sampled_from(SCALES)), data.draw(views))
    z = norm.lmo(m)
    tolerance = ROUNDING[m.dtype]
    assert z.shape == m.shape and z.dtype == m.dtype
    assert float(norm.norm(z)) == pytest.approx(1, abs=tolerance)
    assert inner(m, z) == pytest.approx(-float(norm.dual_norm(m)), rel=tolerance)


@names
@given(data=st.data())
def test_no_point_of_the_ball_is_better(name, data):
    m = data.draw(tensors((torch.float64,), vectors=name not in MATRIX_NORMS))
    norm = exact(name, m, view=data.draw(views))
    point = gaussian(m.shape, data.draw(st.integers(0, 10**6)))
    point /= norm.norm(point)
    assert abs(inner(m, point)) <= float(norm.dual_norm(m)) * (1 + 1e-12)
    assert float(norm.norm(point)) == pytest.approx(1, rel=1e-12)


@names
@given(data=st.data())
def test_inputs_are_not_modified(name, data):
    m = data.draw(tensors(vectors=name not in MATRIX_NORMS))
    kept = m.clone()
    norm = get_norm(name, m.shape, polar=data.draw(st.sampled_from(METHODS)), view=data.draw(views))
    for result in (norm.lmo(m), norm.norm(m), norm.dual_norm(m), norm.direction(norm.matrix(m))):
        assert result.numel() == 0 or result.data_ptr() != m.data_ptr()
        assert torch.equal(m, kept)


@names
@given(data=st.data())
def test_scale_invariance(name, data):
    """lmo(s·M) = lmo(M), bit for bit, also in float32, where the squares of 3e20 and 3e-21 are out of range."""
    m = data.draw(tensors((torch.float32, torch.float64), vectors=name not in MATRIX_NORMS))
    method = data.draw(st.sampled_from(["polar_express", "newton_schulz"]))
    norm = get_norm(name, m.shape, polar=method, view=data.draw(views))
    for power in (2.0**68, 2.0**-68):
        assert torch.equal(norm.lmo(m * power), norm.lmo(m))
        assert norm.norm(m * power).item() == pytest.approx(norm.norm(m).item() * power, rel=1e-5)
        assert norm.dual_norm(m * power).item() == pytest.approx(norm.dual_norm(m).item() * power, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@names
def test_duality_far_from_one(name, scale):
    m = (gaussian((5, 7)) * scale).float()
    norm = exact(name, m)
    assert inner(m, norm.lmo(m)) == pytest.approx(-float(norm.dual_norm(m)), rel=1e-5)
    assert float(norm.norm(norm.lmo(m))) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(4, 3), (1, 5), (5, 1), (3, 2, 2), (3, 2, 3, 3)])
@names
def test_zero(name, shape, method, dtype):
    m = torch.zeros(shape, dtype=dtype)
    for view in VIEWS:
        norm = get_norm(name, m.shape, polar=method, view=view)
        assert not norm.lmo(m).any() and norm.norm(m) == 0 and norm.dual_norm(m) == 0


@names
def test_zero_rows_and_columns(name):
    m = gaussian((6, 5))
    m[2], m[:, 3] = 0, 0
    z = exact(name, m).lmo(m)
    assert z.isfinite().all() and z[2].abs().max() < 1e-12 and z[:, 3].abs().max() < 1e-12


@pytest.mark.parametrize("name", [n for n in NORMS if n != "sign"])  # torch.sign(nan) is 0
def test_nan_is_not_hidden(name):
    m = gaussian((3, 4))
    m[1, 2] = math.nan
    assert get_norm(name, m.shape).lmo(m)[1, 2].isnan()


def test_formulas():
    m = gaussian((4, 6))
    u, _, vh = torch.linalg.svd(m, full_matrices=False)
    expected = {
        "spectral": math.sqrt(4 / 6) * u @ vh,
        "sign": m.sign() / 6,
        "colnorm": math.sqrt(4) * m / m.norm(dim=0, keepdim=True),
        "rownorm": m / (math.sqrt(6) * m.norm(dim=1, keepdim=True)),
        "frobenius": m / m.norm(),
        "rms": m / m.square().mean().sqrt(),
    }
    for name, direction in expected.items():
        assert torch.allclose(exact(name, m).lmo(m), -direction, rtol=0, atol=1e-13)


def test_convolutions():
    """(o, i, k, k) is (o, i·k²), with Scion's factor √(o/i)/k²."""
    m = gaussian((8, 2, 3, 3))
    flat = m.flatten(1)
    u, _, vh = torch.linalg.svd(flat, full_matrices=False)
    assert torch.allclose(exact("spectral", m).lmo(m).flatten(1), -math.sqrt(8 / 2) / 9 * u @ vh, rtol=0, atol=1e-13)
    m1 = gaussian((8, 2, 5))
    u, _, vh = torch.linalg.svd(m1.flatten(1), full_matrices=False)
    assert torch.allclose(exact("spectral", m1).lmo(m1).flatten(1), -math.sqrt(8 / 2) / 5 * u @ vh, rtol=0, atol=1e-13)
    for name in ("sign", "colnorm", "rownorm", "frobenius", "rms"):
        assert torch.allclose(exact(name, m).lmo(m).flatten(1), exact(name, flat).lmo(flat), rtol=0, atol=1e-14)


@names
def test_a_stack_is_matrices_with_a_ball_each(name):
    m = gaussian((2, 3, 8, 5))
    stack, one = exact(name, m, view="stack"), exact(name, m[0, 0])
    members = m.flatten(0, 1)
    assert torch.allclose(stack.lmo(m).flatten(0, 1), torch.stack([one.lmo(x) for x in members]), rtol=0, atol=1e-13)
    assert float(stack.norm(m)) == pytest.approx(max(float(one.norm(x)) for x in members), rel=1e-12)
    assert float(stack.dual_norm(m)) == pytest.approx(sum(float(one.dual_norm(x)) for x in members), rel=1e-12)


@names
def test_three_dimensions_must_be_declared(name):
    """(experts, d_out, d_in) is not silently flattened like a convolution. Norms that see no matrix do not mind."""
    if name in ("frobenius", "rms"):
        assert get_norm(name, torch.Size((4, 3, 2))).name == name
        return
    with pytest.raises(ValueError, match=r"\(4, 3, 2\) may be .* put view='convolution' or view='stack' into its group"):
        get_norm(name, torch.Size((4, 3, 2)))
    assert not get_norm(name, torch.Size((4, 3, 2, 2))).stack, "four dimensions are a convolution"


def test_auto_goes_by_shape():
    kinds = {(): "rms", (5,): "rms", (5, 3): "spectral", (5, 3, 2): "spectral", (5, 3, 2, 2): "spectral"}
    assert {shape: get_norm("auto", torch.Size(shape), view="stack").name for shape in kinds} == kinds


# ---- initialisation -------------------------------------------------------------------------------------------------------


@names
@given(data=st.data())
def test_init_is_on_the_sphere(name, data):
    w = data.draw(tensors(vectors=name not in MATRIX_NORMS))
    radius = data.draw(st.sampled_from([0.01, 1.0, 50.0]))
    norm = get_norm(name, w.shape, view=data.draw(views))
    seed = data.draw(st.integers(0, 100))
    assert norm.init(w, radius, torch.Generator().manual_seed(seed)) is w
    assert float(norm.norm(w)) == pytest.approx(radius, rel=ROUNDING[w.dtype])
    again = norm.init(torch.empty_like(w), radius, torch.Generator().manual_seed(seed))
    assert torch.equal(again, w)


@names
def test_init_is_random_and_takes_parameters(name):
    p = nn.Parameter(torch.empty(20, 30))
    norm = get_norm(name, p.shape)
    first = norm.init(p).detach().clone()
    assert not torch.equal(first, norm.init(p)) and p.requires_grad and p.grad_fn is None


# ---- scale rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (16, 4), (4, 16), (3, 7), (50304, 768)])
def test_scale_rules_are_those_of_torch(shape):
    assert spectral_factor(torch.Size(shape), "muon") == pytest.approx(_adjust_lr(1.0, "original", torch.Size(shape)))
    other = _adjust_lr(1.0, "match_rms_adamw", torch.Size(shape))
    assert spectral_factor(torch.Size(shape), "moonlight") == pytest.approx(other)


@pytest.mark.parametrize(
    "shape, scion, muon, moonlight",
    [
        ((16, 4), 2.0, 2.0, 0.8),
        ((4, 16), 0.5, 1.0, 0.8),
        ((9, 9), 1.0, 1.0, 0.6),
        ((8, 2, 3, 3), 2 / 9, 1.0, 0.2 * math.sqrt(18)),
        ((8, 2, 4), 2 / 4, 1.0, 0.2 * math.sqrt(8)),
    ],
)
def test_scale_rules_by_hand(shape, scion, muon, moonlight):
    expected = {"scion": scion, "muon": muon, "moonlight": moonlight, "none": 1.0}
    for rule, factor in expected.items():
        m = gaussian(shape)
        assert spectral_factor(m.shape, rule) == pytest.approx(factor, rel=1e-15)
        assert torch.linalg.matrix_norm(exact("spectral", m, rule).lmo(m).flatten(1), 2).item() == pytest.approx(factor)


@pytest.mark.parametrize("scale", SCALES)
def test_scale_rule_in_the_optimizer(scale):
    p = nn.Parameter(torch.zeros(12, 3, dtype=torch.float64))
    p.grad = gaussian((12, 3))
    Gluon([p], lr=0.1, radius=2.0, scale=scale, polar="svd").step()
    assert torch.linalg.matrix_norm(p, 2).item() == pytest.approx(0.2 * spectral_factor(p.shape, scale), rel=1e-12)


# ---- the polar factor -----------------------------------------------------------------------------------------------------


def with_singular_values(values, rows, columns, seed=0):
    u, _, vh = torch.linalg.svd(gaussian((rows, columns), seed), full_matrices=False)
    return (u * values) @ vh, u @ vh


BOUNDS = {"polar_express": (0.84, 1.13, 1e-3), "newton_schulz": (0.68, 1.21, 3e-3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, columns", [(40, 40), (60, 40), (40, 60)])
@pytest.mark.parametrize("method", BOUNDS)
def test_singular_values_within_the_stated_bounds(method, rows, columns, dtype):
    low, high, smallest = BOUNDS[method]
    values = torch.logspace(math.log10(smallest), 0, 40, dtype=torch.float64).flip(0)
    m, _ = with_singular_values(values, rows, columns)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    reached = (u.T @ polar(m.to(dtype), method).double() @ vh.T).diagonal()  # the singular vectors stay
    counted = s / s.norm() >= smallest
    assert 30 < counted.sum() < 40
    assert low <= reached[counted].min() and reached[counted].max() <= high
    assert reached[~counted].min() > 0 and reached[~counted].max() <= high, "smaller values keep their sign"


@given(seed=st.integers(0, 10**6), shape=st.tuples(st.integers(1, 9), st.integers(1, 12)))
def test_the_bounds_hold_for_random_matrices(seed, shape):
    m = gaussian(shape, seed)
    values = torch.linalg.svdvals(m) / m.norm()
    for method, (low, high, smallest) in BOUNDS.items():
        reached = torch.linalg.svdvals(polar(m, method))
        assert reached.max() <= high
        assert (values < smallest).any() or reached.min() >= low


@pytest.mark.parametrize("rows, columns", [(8, 8), (30, 8), (8, 30)])
def test_agreement_with_the_svd_on_well_conditioned_input(rows, columns):
    m, factor = with_singular_values(torch.linspace(0.5, 1, 8, dtype=torch.float64), rows, columns)
    assert torch.allclose(polar(m, "svd"), factor, rtol=0, atol=1e-14)
    assert torch.linalg.matrix_norm(polar(m, "polar_express") - factor, 2) < 0.13
    assert torch.linalg.matrix_norm(polar(m, "newton_schulz") - factor, 2) < 0.32
    assert torch.allclose(polar(m, "polar_express", 8), factor, rtol=0, atol=1e-13), "eight steps: to rounding"
    assert torch.allclose(polar(m, "polar_express", 20), factor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7, 4, 6), (7, 6, 4), (2, 3, 5, 5), (1, 1, 9)])
def test_batched_equals_one_by_one(method, shape):
    stack = gaussian(shape)
    together = polar(stack, method)
    assert together.shape == stack.shape
    flat = stack.reshape(-1, *shape[-2:])
    for m, factor in zip(flat, together.reshape(-1, *shape[-2:]), strict=True):
        assert torch.allclose(polar(m, method), factor, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_transposition(method):
    m = gaussian((4, 9))
    assert torch.allclose(polar(m.T, method), polar(m, method).T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_nonzero_matrices_in_one_stack(method):
    stack = torch.stack([torch.zeros(3, 4), gaussian((3, 4), dtype=torch.float32)])
    assert not polar(stack, method)[0].any()
    assert torch.allclose(polar(stack, method)[1], polar(stack[1], method), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_precision(method):
    """float64 is computed in float64. Small matrices in half precision are computed in float32."""
    m = gaussian((5, 8))
    assert polar(m, method).dtype == torch.float64
    difference = (polar(m, method) - polar(m.float(), method).double()).abs().max()
    assert 1e-12 < difference < 1e-4
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert polar(m.to(dtype), method).dtype == work_dtype(m.to(dtype), method) == torch.float32


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
@pytest.mark.parametrize("units", [True, False])
def test_a_cpu_with_bfloat16_units_uses_them_for_matrices_that_gain(method, units, monkeypatch):
    monkeypatch.setattr(optim.polar, "has_bfloat16_units", lambda device: units)
    m = gaussian((2, 96, 64), dtype=torch.float32)
    factor = polar(m, method)
    assert factor.dtype == work_dtype(m, method) == (torch.bfloat16 if units else torch.float32)
    assert polar(m[:, :63], method).dtype == polar(m, "svd").dtype == torch.float32
    exact = polar(m.double(), method)
    assert (factor - exact).norm() < (2e-2 if units else 1e-5) * exact.norm()
    assert (work_dtype(m.double(), method), exact.dtype) == (torch.float64, torch.float64)


def test_bfloat16_units_are_looked_for_on_every_device():
    assert has_bfloat16_units(torch.device("cpu")) in (True, False)
    assert not has_bfloat16_units(torch.device("mps")) and not has_bfloat16_units(torch.device("meta"))


@given(seed=st.integers(0, 10**6), rank=st.integers(1, 3))
def test_svd_leaves_out_the_null_space(seed, rank):
    m = gaussian((6, 8), seed, rank)
    values = torch.linalg.svdvals(polar(m, "svd"))
    assert torch.allclose(values[:rank], torch.ones(rank, dtype=torch.float64), atol=1e-10) and values[rank:].max() < 1e-10


def test_overwrite_is_only_permission():
    for method in METHODS:
        for m in (gaussian((3, 4, 6)), gaussian((3, 6, 4))):
            assert torch.allclose(polar(m.clone(), method, overwrite=True), polar(m, method), rtol=0, atol=1e-14)
    for name in NORMS:
        m = gaussian((4, 6))
        expected = get_norm(name, m.shape).direction(m)
        assert torch.allclose(get_norm(name, m.shape).direction(m.clone(), overwrite=True), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("method", ["ns", "", None, 5])
def test_unknown_method(method):
    with pytest.raises(ValueError, match="polar must be one of polar_express, newton_schulz, svd"):
        polar(torch.eye(2), method)
