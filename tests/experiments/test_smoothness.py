"""experiments/smoothness.py: the estimators on functions with known constants, and a run of a few updates."""

import json
import math

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.tokenize_text import tokenize_documents
from experiments import smoothness
from experiments.setup import batches, build
from optim.norms import get_norm

NORMS = ("spectral", "sign", "frobenius", "colnorm")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def svd_norm(name: str, shape=(4, 3)):
    return get_norm(name, torch.Size(shape), "scion", "svd")


# ---- the fit


def test_fit_finds_a_line():
    x = np.linspace(0.1, 3, 20)
    fit = smoothness.fit_line(x, 2 + 0.5 * x)
    assert (fit.l0, fit.l1, fit.covered) == (pytest.approx(2), pytest.approx(0.5), 1.0)
    assert fit.gain == pytest.approx(1)


def test_fit_of_a_constant_has_no_slope():
    fit = smoothness.fit_line([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert (fit.l0, fit.l1, fit.gain) == (pytest.approx(4), pytest.approx(0, abs=1e-9), 0)


def test_constants_are_never_negative():
    falling = smoothness.fit_line([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert falling.l1 == 0 and falling.gain == 0 and falling.l0 > 2  # the points above count for more
    steep = smoothness.fit_line([1.0, 2.0, 3.0], [0.1, 2.0, 4.0])
    assert steep.l0 == 0 and steep.l1 > 1


def test_fit_is_the_minimum_of_its_loss():
    generator = np.random.default_rng(0)
    x = generator.uniform(0, 2, 60)
    y = 1 + 2 * x + generator.normal(0, 0.5, 60)

    def loss(l0: float, l1: float) -> float:
        residual = y - l0 - l1 * x
        return float(np.sum(np.where(residual > 0, smoothness.PENALTY, 1) * residual**2))

    fit = smoothness.fit_line(x, y)
    best = loss(fit.l0, fit.l1)
    for dl0 in (-0.02, 0, 0.02):
        for dl1 in (-0.02, 0, 0.02):
            assert best <= loss(fit.l0 + dl0, fit.l1 + dl1) + 1e-9
    assert 0.7 < fit.covered < 1  # leans towards a bound
    assert smoothness.fit_line(x, y, penalty=1000).covered > fit.covered


def test_fit_does_not_depend_on_units():
    x, y = np.array([1.0, 2.0, 4.0, 5.0]), np.array([1.0, 2.5, 3.0, 5.0])
    fit, scaled = smoothness.fit_line(x, y), smoothness.fit_line(1e-6 * x, 1e3 * y)
    assert (scaled.l0, scaled.l1) == (pytest.approx(1e3 * fit.l0), pytest.approx(1e9 * fit.l1))


def test_fit_refuses_what_is_not_finite():
    with pytest.raises(UserError, match="two updates or more"):
        smoothness.fit_line([1.0, math.nan], [1.0, 1.0])


# ---- known functions


def test_quadratic_has_its_constant_in_the_euclidean_norm():
    """f = L/2 ‖X - A‖², so the ratio is L everywhere: L0 = L, L1 = 0."""
    norm, target = svd_norm("frobenius"), torch.randn(4, 3, dtype=torch.float64)
    steps = []
    x = torch.zeros(4, 3, dtype=torch.float64)
    for _ in range(20):
        x2 = x - 0.1 * (x - target) + 0.01 * torch.randn_like(x)
        steps.append(smoothness.compare(norm, x, x2, [3 * (x - target)] * 2, [3 * (x2 - target)] * 2))
        x = x2
    fit = smoothness.fit_line([step.gradient for step in steps], [step.ratio for step in steps])
    assert (fit.l0, fit.l1) == (pytest.approx(3), pytest.approx(0, abs=1e-6))
    assert all(step.sigma == step.difference_noise == 0 for step in steps)


@pytest.mark.parametrize("name", NORMS)
def test_quadratic_along_an_lmo_step(name):
    """f = L/2 ‖X‖² and X' = X - t·lmo: the ratio is L times the dual norm of the step over its norm."""
    norm = svd_norm(name)
    x = torch.randn(4, 3, dtype=torch.float64)
    update = 0.1 * norm.lmo(torch.randn_like(x))
    step = smoothness.compare(norm, x, x + update, [2 * x] * 2, [2 * (x + update)] * 2)
    assert step.distance == pytest.approx(0.1)
    assert step.gradient == pytest.approx(float(norm.dual_norm(2 * x)))
    assert step.ratio == pytest.approx(2 * float(norm.dual_norm(update)) / 0.1)


def test_exponential_has_its_constant_as_l1():
    """f = exp(c·x): the gradient changes by c times itself per unit, so L0 = 0 and L1 = c."""
    norm, c = svd_norm("frobenius", (1, 1)), 0.7
    steps = []
    for x in torch.linspace(3, -3, 40, dtype=torch.float64):
        points = torch.stack([x, x - 1e-4]).reshape(2, 1, 1)
        gradients = c * torch.exp(c * points)
        steps.append(smoothness.compare(norm, points[0], points[1], [gradients[0]] * 2, [gradients[1]] * 2))
    fit = smoothness.fit_line([step.gradient for step in steps], [step.ratio for step in steps])
    assert (fit.l0, fit.l1) == (pytest.approx(0, abs=1e-4), pytest.approx(c, rel=1e-3))
    assert fit.gain > 0.99


def test_noise_of_gradients_and_of_their_differences():
    """For g_b = (1 + s_b) X + n_b the noise is n_b + s_b X, and that of the difference is s_b (X' - X)."""
    norm, count = svd_norm("frobenius"), 2000
    x = torch.zeros(4, 3, dtype=torch.float64)
    x2 = x + 0.5 * torch.nn.functional.normalize(torch.randn(12, dtype=torch.float64), dim=0).view(4, 3)
    s = 0.3 * torch.randn(count, dtype=torch.float64)
    n = 2.0 * torch.randn(count, 4, 3, dtype=torch.float64)
    step = smoothness.compare(norm, x, x2, *([(1 + a) * at + b for a, b in zip(s, n, strict=True)] for at in (x, x2)))
    assert step.sigma == pytest.approx(2 * math.sqrt(12), rel=0.03)
    assert step.difference_noise / step.distance == pytest.approx(0.3, rel=0.05)
    assert step.ratio == pytest.approx(1 + float(s.mean()))


@pytest.mark.parametrize("count", (2, 3, 8))
def test_the_spread_has_no_bias_from_the_mean(count):
    norm = svd_norm("frobenius", (1, 1))
    squares = []
    for _ in range(800):
        parts = list(torch.randn(count, 1, 1, dtype=torch.float64))
        squares.append(smoothness.spread(norm, parts, torch.stack(parts).mean(0)) ** 2)
    assert np.mean(squares) == pytest.approx(1, rel=0.15)


# ---- the command


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoothness")
    tokenize_documents([f"{number} is a number, and {number * 7 % 13} is one too. " * 9 for number in range(60)],
                       folder / "data", "bytes", in_val=lambda number, _: number == 0)  # fmt: skip
    sizes = ["--batch-size", "2", "--seq-len", "16", "--n-layer", "2", "--d-model", "16", "--val-tokens", "64"]
    arguments = [
        "--out",
        str(folder / "out"),
        "--pool",
        "2",
        "--probe",
        "2",
        "--data-dir",
        str(folder / "data"),
        "--steps",
        "4",
    ]
    return folder, [*arguments, *sizes]


def test_a_run_and_its_files(short_run, capsys, monkeypatch):
    folder, arguments = short_run
    monkeypatch.setattr(smoothness, "DPI", 40)
    smoothness.main(arguments)
    printed = capsys.readouterr().out
    result = json.loads((folder / "out" / "smoothness.json").read_text())
    assert len(result["layers"]) == 13 and len(result["pool_loss"]) == 5
    assert all(len(values) == 4 for series in result["layers"].values() for values in series.values())
    assert {probe["update"] for probe in result["probes"]} == {2} and len(result["probes"]) == 3 * 13
    layer = result["layers"]["blocks.1.mlp.proj.weight"]
    assert layer["distance"] == pytest.approx([0.02] * 4, rel=0.4)  # lr times the radius, as far as the polar factor is exact
    assert layer["error_0"][0] == layer["error_1"][0] and layer["error_0"][1] != layer["error_1"][1]
    assert "| embedding (sign) |" in printed and "| error, γ = 1 |" in printed
    for name in ("smoothness.png", "noise.png"):
        assert (folder / "out" / name).read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(smoothness, "draw", lambda *_: None)
    smoothness.main(["--out", str(folder / "out"), "--replot"])
    assert capsys.readouterr().out == printed


def test_the_measured_run_is_the_trainers(short_run):
    """Measuring does not change the run: the losses are those of a plain training loop."""
    _, arguments = short_run
    options = arguments[arguments.index("--data-dir") :]
    config = smoothness.load_config(["--config", str(smoothness.ROOT / "configs" / "quickstart_gluon.py"), *options])
    measured = smoothness.measure(config, 2, [1], lambda _: None)
    again = smoothness.measure(config, 2, [], lambda _: None)
    assert measured["pool_loss"] == again["pool_loss"]

    model, optimizer = build(config)
    with batches(config) as loader:
        for step in range(config.steps):
            model(*loader.batch(step)).backward()
            optimizer.step()
        loss = sum(model(*loader.batch(config.steps + b)).item() for b in range(2)) / 2
    assert loss == pytest.approx(measured["pool_loss"][-1], rel=1e-6)


def test_mistakes_are_one_line(short_run, tmp_path):
    _, arguments = short_run
    with pytest.raises(UserError, match="--probe is a list"):
        smoothness.main([*arguments, "--probe", "x"])
    with pytest.raises(UserError, match="run must use gluon"):
        smoothness.main([*arguments, "--optimizer", "mvr2"])
    with pytest.raises(UserError, match="at least 2 micro-batches"):
        smoothness.main([*arguments, "--pool", "1"])
    with pytest.raises(UserError, match="need more data than"):
        smoothness.main([*arguments, "--pool", "100000"])
    with pytest.raises(UserError, match="lower --lr"):
        smoothness.main([*arguments, "--lr", "1e35"])
    for text in (None, "{", "{}", "[1]"):
        if text:
            (tmp_path / "smoothness.json").write_text(text)
        with pytest.raises(UserError, match=r"smoothness.json.*run without --replot"):
            smoothness.main(["--out", str(tmp_path), "--replot"])
