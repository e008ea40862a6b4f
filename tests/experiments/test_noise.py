"""experiments/noise.py: the estimators on gradients of known noise, and a run of a few updates."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.tokenize_text import tokenize_documents
from experiments.noise import _ratio, along, noise_ratio, spread
from experiments.run_jobs import ROOT
from experiments.setup import batches, build
from optim.norms import get_norm
from training.config import load_config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def svd_norm(name: str, shape=(4, 3)):
    return get_norm(name, torch.Size(shape), "scion", "svd")


def test_noise_of_gradients_and_of_their_differences():
    """For g_b = (1 + s_b) X + n_b the noise is n_b + s_b X, and that of the difference is s_b (X' - X)."""
    norm, count = svd_norm("frobenius"), 2000
    x = torch.zeros(4, 3, dtype=torch.float64)
    x2 = x + 0.5 * torch.nn.functional.normalize(torch.randn(12, dtype=torch.float64), dim=0).view(4, 3)
    s = 0.3 * torch.randn(count, dtype=torch.float64)
    n = 2.0 * torch.randn(count, 4, 3, dtype=torch.float64)
    before, after = ([(1 + a) * at + b for a, b in zip(s, n, strict=True)] for at in (x, x2))
    assert spread(norm, before) == pytest.approx(2 * np.sqrt(12), rel=0.03)
    assert _ratio(norm, before, after) == pytest.approx(0.3 * 0.5 / (2 * np.sqrt(12)), rel=0.05)


@pytest.mark.parametrize("name", ("spectral", "sign", "colnorm"))
def test_the_noise_is_measured_in_the_dual_norm(name):
    """Two parts at ±D from their mean: the squared distances are ‖D‖² each, and their sum is divided by n - 1 = 1."""
    norm, mean, d = svd_norm(name), torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert spread(norm, [mean + d, mean - d]) == pytest.approx(2**0.5 * float(norm.dual_norm(d)))
    assert _ratio(norm, [mean, mean], [mean, mean]) == 0


@pytest.mark.parametrize("count", (2, 3, 8))
def test_the_spread_has_no_bias_from_the_mean(count):
    norm = svd_norm("frobenius", (1, 1))
    squares = [spread(norm, list(torch.randn(count, 1, 1, dtype=torch.float64))) ** 2 for _ in range(800)]
    assert np.mean(squares) == pytest.approx(1, rel=0.15)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "data"
    texts = [f"{number} is a number, and {number * 7 % 13} is one too. " * 9 for number in range(60)]
    tokenize_documents(texts, folder, "bytes", in_val=lambda number, _: number == 0)
    return folder


def config_of(data, *words):
    sizes = ["--batch-size=2", "--seq-len=16", "--n-layer=2", "--d-model=16", "--val-tokens=64", "--steps=4"]
    return load_config([f"--config={ROOT / 'configs' / 'quickstart_gluon.py'}", f"--data-dir={data}", *sizes, *words])


def test_the_measured_run_is_the_trainers(data):
    """Measuring does not change the run: the last gradients are those after a plain training loop."""
    config = config_of(data)
    updates = list(along(config, 2))
    model, optimizer = build(config)
    with batches(config) as loader:
        for step in range(config.steps):
            model(*loader.batch(step)).backward()
            optimizer.step()
        wanted = [torch.autograd.grad(model(*loader.batch(config.steps + b)), list(model.parameters())) for b in range(2)]
    assert len(updates) == config.steps
    torch.testing.assert_close([list(gradients) for gradients in wanted], updates[-1][2])
    assert 0 < noise_ratio(config, 2) < 10


def test_mistakes_are_one_line(data):
    for words, pool, said in [
        (["--optimizer=mvr2"], 2, "run must use gluon"),
        ([], 1, "at least 2 micro-batches"),
        ([], 100000, "need more data than"),
        (["--lr=1e35"], 2, "lower --lr"),
    ]:
        with pytest.raises(UserError, match=said):
            noise_ratio(config_of(data, *words), pool)
