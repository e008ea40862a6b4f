"""experiments/noise.py: the estimators on gradients of known noise, and runs of a few updates against plain loops."""

import math

import pytest
import torch

from data.tokenize_text import tokenize_documents
from experiments.noise import along, by_kind, compared, exact, mean_gradient, moments, spread, summary, total
from experiments.run_jobs import ROOT
from experiments.setup import batches, build
from training.config import load_config


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- the estimators


def made_up(count, noise=2.0, slope=0.3):
    """Gradients g_b = (1 + s_b) X + n_b of one parameter at two weights, which are returned too."""
    x, x2 = torch.randn(2, 4, 3, dtype=torch.float64)
    s = slope * torch.randn(count, 1, 1, dtype=torch.float64)
    n = noise * torch.randn(count, 4, 3, dtype=torch.float64)
    return x, x2, *([[(1 + a) * at + b] for a, b in zip(s, n, strict=True)] for at in (x, x2))


def test_moments_of_gradients_with_known_noise():
    """The noise of g_b is n_b + s_b X, and that of the difference is s_b (X' - X)."""
    x, x2, before, after = made_up(4000)
    (found,) = moments(before, after)
    step = (x2 - x).square().sum().item()
    assert found["sigma"] == pytest.approx(12 * 4 + 0.09 * x.square().sum().item(), rel=0.05)
    assert found["difference"] == pytest.approx(0.09 * step, rel=0.05)
    assert found["d"] == pytest.approx(step, rel=0.03)
    assert found["g"] == pytest.approx(x.square().sum().item(), rel=0.1)
    assert found["product"] == pytest.approx((x * x2).sum().item(), abs=0.5)


@pytest.mark.parametrize("count", (2, 3, 8))
def test_a_small_pool_gives_no_bias(count):
    """With few batches the noise of the mean is large, and |mean|² is too large by it. The estimate is right on average."""
    trials = 4000
    a = 1 + torch.randn(trials, count, dtype=torch.float64)
    b = 0.5 * a + torch.randn(trials, count, dtype=torch.float64) + 1  # mean 1.5, covariance 0.5
    found = [spread(list(x), list(y)) for x, y in zip(a, b, strict=True)]
    products, covariances = torch.tensor(found).mean(0)
    assert products == pytest.approx(1.5, abs=0.1)
    assert covariances == pytest.approx(0.5, abs=0.1)


def test_the_best_scale_has_the_least_error():
    """γ* is the γ for which γ D_b is nearest to D on average, on batches of the pool's size."""
    x, x2, before, after = made_up(2000, slope=0.8)
    (moment,) = moments(before, after)
    best = summary(moment, 4, (4, 400))
    d = torch.stack([b - a for (a,), (b,) in zip(before, after, strict=True)])

    def error(gamma):
        return (gamma * d - (x2 - x)).square().sum((1, 2)).mean().item()

    assert 0.5 < best["gamma_4"] < 0.7
    assert error(best["gamma_4"]) < min(error(best["gamma_4"] + 0.1), error(best["gamma_4"] - 0.1))
    assert best["gamma_400"] == pytest.approx(1 / (1 + 0.64 / 100), abs=0.002)  # a hundredth of the noise


def test_summary_by_hand():
    moment = {"g": 4.0, "g2": 9.0, "product": -3.0, "d": 16.0, "sigma": 8.0, "difference": 2.0}
    found = summary(moment, 8, (8, 16))
    wanted = {"noise_scale": 16.0, "noise_ratio": 0.5, "change": 2.0, "cosine": -0.5, "gamma_8": 16 / 18, "gamma_16": 16 / 17}
    assert found == pytest.approx(wanted)
    assert math.isnan(summary(moment | {"g": -1.0}, 8, (8,))["noise_scale"])  # drowned in noise


def test_moments_are_summed_by_kind():
    one = dict.fromkeys(("g", "g2", "product", "d", "sigma", "difference"), 1.0)
    found = by_kind({"blocks.0.attention.q.weight": one, "blocks.1.attention.q.weight": one, "embedding.weight": one})
    assert found == {"q": dict.fromkeys(one, 2.0), "embedding": one}
    assert total(found) == dict.fromkeys(one, 3.0)


def test_cosine_and_change():
    found = compared([torch.tensor([3.0, 0.0]), torch.tensor(4.0)], [torch.tensor([-3.0, 0.0]), torch.tensor(4.0)])
    assert found == pytest.approx({"cosine": 7 / 25, "change": 6 / 5})


# ---- runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "data"
    texts = [f"{number} is a number, and {number * 7 % 13} is one too. " * 9 for number in range(60)]
    tokenize_documents(texts, folder, "bytes", in_val=lambda number, _: number == 0)
    return folder


def config_of(data, *words):
    sizes = ["--batch-size=4", "--micro-batch-size=2", "--seq-len=16", "--n-layer=2", "--d-model=16", "--steps=5"]
    return load_config([f"--config={ROOT / 'configs' / 'quickstart_gluon.py'}", f"--data-dir={data}", *sizes, *words])


@pytest.mark.parametrize("words", (("--optimizer=gluon",), ("--optimizer=mvr2",), ("--optimizer=mvr3", "--gamma=0.3")))
def test_an_exact_run_is_a_plain_loop_on_one_batch(data, words):
    """Also for methods of two gradients: the kept gradient is the one that the first pass would compute."""
    config = config_of(data, "--dtype=float64", *words)
    lines = exact(config, 2)
    model, optimizer = build(config)
    with batches(config) as loader:
        batch = loader.batch(0)
    losses = {}

    def closure():
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        losses[optimizer.updates] = loss.item()
        return loss

    for _ in range(config.steps):
        optimizer.step(closure)
    if hasattr(optimizer, "flush"):
        optimizer.flush()
    closure()
    assert [line["update"] for line in lines] == [0, 2, 4, 5]
    assert [line["train_loss"] for line in lines] == pytest.approx([losses[u] for u in (0, 2, 4, 5)], rel=1e-12)
    assert [sorted(line.keys() & {"cosine", "change"}) for line in lines] == [[], *[["change", "cosine"]] * 3]


@pytest.mark.parametrize("words", (("--optimizer=mvr1", "--momentum=0.9"), ("--optimizer=mvr3", "--momentum=0.2", "--q=0.5")))
def test_without_noise_gamma_1_is_gluon_without_momentum(data, words):
    double = "--dtype=float64"
    found = exact(config_of(data, double, "--gamma=1", *words), 1)
    plain = exact(config_of(data, double, "--momentum=0"), 1)
    kept = exact(config_of(data, double, "--momentum=0.9"), 1)
    losses = [[line["train_loss"] for line in lines] for lines in (found, plain, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] != pytest.approx(losses[2], rel=1e-4)


def test_without_noise_mvr2_is_gluon(data):
    found = exact(config_of(data, "--optimizer=mvr2", "--momentum=0.9", "--q=0.5"), 1)
    plain = exact(config_of(data, "--momentum=0.9"), 1)
    assert [line["train_loss"] for line in found] == [line["train_loss"] for line in plain]


def test_the_measured_run_is_the_trainers(data):
    """Measuring does not change the run, and the pool is text after the run's."""
    config = config_of(data)
    lines = along(config, (1, 4), 3, 2)
    model, optimizer = build(config)
    with batches(config) as loader:
        pool = [tuple(half for half in loader.batch(config.steps + b // 2)) for b in range(3)]
        pool = [tuple(rows[2 * (b % 2) :][:2] for rows in batch) for b, batch in enumerate(pool)]
        found = []
        for step in range(config.steps):
            before = [mean_gradient(model, *batch, 2) for batch in pool]
            model(*loader.batch(step)).backward()
            optimizer.step()
            after = [mean_gradient(model, *batch, 2) for batch in pool]
            wanted = total(by_kind(dict(enumerate_names(model, moments([g for _, g in before], [g for _, g in after])))))
            found.append((sum(loss for loss, _ in before) / 3, wanted))
    assert [line["update"] for line in lines] == [1, 4]
    for line in lines:
        loss, wanted = found[line["update"]]
        assert line["train_loss"] == pytest.approx(loss, rel=1e-4)
        assert total(line["moments"]) == pytest.approx(wanted, rel=2e-3)
    assert lines[0]["moments"].keys() == {"q", "k", "v", "o", "fc", "proj", "embedding"}


def enumerate_names(model, found):
    return zip((name for name, _ in model.named_parameters()), found, strict=True)
