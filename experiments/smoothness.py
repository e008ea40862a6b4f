"""How smooth is a GPT along a real run, layer by layer, and how noisy? Measures what the theory assumes.

    python -m experiments.smoothness             # about 10 minutes on one core; writes results/smoothness/
    python -m experiments.smoothness --steps 30 --pool 4 --out results/quick
    python -m experiments.smoothness --replot    # the table and the pictures again, from the JSON

Any option of train_gpt.py can be given too (default: configs/quickstart_gluon.py).

**The assumption.** Gluon (Riabinin, Shulgin, Gruntkowska and Richtárik, arXiv 2505.13416) assumes layer-wise
(L0, L1)-smoothness, in each layer's own norm and its dual:

    ||grad_i f(X') - grad_i f(X)||_* <= (L0_i + L1_i ||grad_i f(X)||_*) ||X'_i - X_i||

**The estimator**, in the spirit of that paper's experiments. The run is an ordinary one of Gluon. For consecutive iterates
X = X_k, X' = X_{k+1} (all layers move, as in training) the left side over ||X'_i - X_i|| is the ratio L_i[k]. The line
L0 + L1 ||grad_i f(X_k)||_* with L0, L1 >= 0 is fitted to the points (||grad_i f(X_k)||_*, L_i[k]) of a layer by least squares
in which a point above the line weighs `PENALTY` times one below, since the line is meant as a bound. `covered` is the share of
points that it does bound. `gain` is the share of the best constant's loss that the slope removes: 0 means that L1 does nothing.
As with any estimate along a trajectory, these are lower bounds of the assumption's constants, which hold for all X, X'.

**The full gradient** is that of f = the mean loss over a fixed pool of sequences, which the run does not train on, so every
difference is an exact difference of this f. The pool has n micro-batches of the run's batch size. Their gradients g_b give

    sigma_i^2 = n/(n-1) mean_b ||g_b - grad f||_*^2                                        the noise of a gradient, and
    S_i^2     = n/(n-1) mean_b ||(g_b(X') - g_b(X)) - (grad f(X') - grad f(X))||_*^2       the noise of a difference.

S_i is the noise that the correction of MVR-1 adds when it removes bias. S_i / ||X'_i - X_i|| is the mean-squared smoothness
that the theory of variance reduction assumes. With alpha = 1 - beta the momentum's noise is of the order sqrt(alpha/2) sigma
for Gluon and sqrt(alpha/2 sigma^2 + S^2/(2 alpha)) for MVR-1 at gamma = 1. So MVR-1's correction adds less noise than the
gradients themselves if S/sigma < alpha. (Both formulas are for independent noise in a Euclidean norm; dual norms obey them up
to constants.)

**The remaining error** is measured too: that of momenta with gamma = 0 (the run's own), 0.1 and 1, all fed with the run's
batches and weights, against the pool's gradient. It includes the pool's own error of about sigma / sqrt(n).

**Step length.** At a few updates the differences are taken again at X + s (X' - X) for values of s other than 1.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import Parser, UserError, as_written, one_line_errors
from common.files import write_text
from common.pictures import COLOURS, LOOK, pyplot
from common.tables import markdown
from experiments.run_jobs import ROOT
from experiments.setup import batches, build
from optim.norms import Norm, get_norm
from training.config import Config, load_config
from training.optimizers import schedule

PENALTY = 10.0
DPI = 150
FIRST = 5  # first update of the fits and pictures: at the start half of the gradients are exactly zero
GAMMAS = (0.0, 0.1, 1.0)
PROBE_SCALES = (1 / 16, 1 / 4, 4.0)

Gradients = list[Tensor]  # one per layer


# ---- the estimators


@dataclass(frozen=True)
class Fit:
    """L0 + L1·(dual gradient norm), the share of points on or below it, and the gain from L1."""

    l0: float
    l1: float
    covered: float
    gain: float


def fit_line(norms: Sequence[float], ratios: Sequence[float], penalty: float = PENALTY) -> Fit:
    """Least squares with L0, L1 ≥ 0 in which points above the line weigh `penalty` times as much."""
    x, y = np.asarray(norms, float), np.asarray(ratios, float)
    if len(x) < 2 or not np.isfinite(x).all() or not np.isfinite(y).all():
        raise UserError("a fit needs two updates or more that move the layer: give more --steps, and an --lr above 0")
    l0, l1, loss = _expectile_line(x, y, penalty)
    _, _, constant_loss = _expectile_line(np.zeros_like(x), y, penalty)
    gain = 1 - loss / constant_loss if constant_loss > 0 else 0.0
    covered = float(np.mean(y <= (l0 + l1 * x) * (1 + 1e-9)))
    return Fit(l0, l1, covered, max(0.0, gain))


def _expectile_line(x: np.ndarray, y: np.ndarray, penalty: float) -> tuple[float, float, float]:
    """The minimiser by iterated reweighting (the loss is convex and piecewise quadratic), and its loss."""
    scale = x.max() or 1.0
    basis = np.stack([np.ones_like(x), x / scale], axis=1)
    weights = np.ones_like(y)
    seen: set[bytes] = set()
    while weights.tobytes() not in seen:
        seen.add(weights.tobytes())
        coefficients = _nonnegative(basis, y, weights)
        weights = np.where(y > basis @ coefficients, penalty, 1.0)
    residual = y - basis @ coefficients
    return coefficients[0], coefficients[1] / scale, float(np.sum(np.where(residual > 0, penalty, 1.0) * residual**2))


def _nonnegative(basis: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least squares with both coefficients ≥ 0: the best over all supports."""
    root = np.sqrt(weights)
    best, best_loss = np.zeros(2), math.inf
    for support in ([0, 1], [0], [1]):
        solved = np.linalg.lstsq(basis[:, support] * root[:, None], y * root, rcond=None)[0]
        coefficients = np.zeros(2)
        coefficients[support] = np.maximum(solved, 0.0)
        loss = float(np.sum(weights * (y - basis @ coefficients) ** 2))
        if loss < best_loss * (1 - 1e-12):
            best, best_loss = coefficients, loss
    return best


def mean_of(parts: Sequence[Gradients]) -> Gradients:
    """The mean over the micro-batches."""
    return [torch.stack(layer).mean(0) for layer in zip(*parts, strict=True)]


def spread(norm: Norm, parts: Sequence[Tensor], mean: Tensor) -> float:
    """Root mean squared dual distance of the parts from their mean, with n - 1 in the denominator."""
    squares = [float(norm.dual_norm(part - mean)) ** 2 for part in parts]
    return math.sqrt(sum(squares) / (len(squares) - 1))


@dataclass(frozen=True)
class Step:
    """The quantities of one layer for one pair of weights; see the top of this file."""

    distance: float
    gradient: float
    ratio: float
    sigma: float
    difference_noise: float


def compare(norm: Norm, x: Tensor, x2: Tensor, parts: Sequence[Tensor], parts2: Sequence[Tensor]) -> Step:
    """The quantities of a layer whose micro-batches have the gradients `parts` at x and `parts2` at x2."""
    mean, mean2 = torch.stack(list(parts)).mean(0), torch.stack(list(parts2)).mean(0)
    distance = float(norm.norm(x2 - x))
    return Step(
        distance,
        float(norm.dual_norm(mean)),
        float(norm.dual_norm(mean2 - mean)) / distance if distance else math.nan,
        spread(norm, parts, mean),
        spread(norm, [b - a for a, b in zip(parts, parts2, strict=True)], mean2 - mean),
    )


# ---- the run


def measure(config: Config, pool: int, probes: Sequence[int], say: Callable[[str], None]) -> dict:
    """Train as train_gpt.py does and measure at every update. The result is ready for JSON."""
    if config.optimizer != "gluon":
        raise UserError(f"the run must use gluon, not {config.optimizer}: leave --optimizer out")
    if pool < 2:
        raise UserError(f"the pool needs at least 2 micro-batches, not {pool}")
    model, optimizer = build(config)
    set_step = schedule(optimizer, config)
    names = [name for name, _ in model.named_parameters()]
    weights = [p for _, p in model.named_parameters()]
    kinds = {id(p): group["norm"] for group in optimizer.param_groups for p in group["params"]}
    norms = [get_norm(kinds[id(p)], p.shape, config.scale, "svd") for p in weights]
    loader = batches(config)
    if config.steps + pool > loader.steps:
        raise UserError(
            f"{config.steps} steps and a pool of {pool} need more data than {config.data_dir}'s {loader.steps} batches"
        )
    pool_batches = [loader.batch(config.steps + b) for b in range(pool)]
    losses: list[float] = []

    def gradients(batch: tuple[Tensor, Tensor]) -> Gradients:
        loss = model(*batch)
        losses.append(loss.item())
        found = list(torch.autograd.grad(loss, weights))
        if not all(layer.isfinite().all() for layer in found):
            raise UserError("a gradient is not finite; give a lower --lr")
        return found

    def pool_gradients() -> tuple[float, list[Gradients]]:
        parts = [gradients(batch) for batch in pool_batches]
        return sum(losses[-pool:]) / pool, parts

    @torch.no_grad()
    def go_to(values: Gradients) -> None:
        for p, value in zip(weights, values, strict=True):
            p.copy_(value)

    layers: dict[str, dict[str, list[float]]] = {name: {} for name in names}

    def add(name: str, **values: float) -> None:
        for key, value in values.items():
            layers[name].setdefault(key, []).append(value)

    shadows: dict[float, Gradients] = {}
    previous: Gradients | None = None
    pool_losses, probed, past = [], [], 0.0
    loss, parts = pool_gradients()
    started = time.monotonic()
    for step in range(config.steps):
        set_step(step)
        beta, past = bias_corrected(optimizer.param_groups[0]["momentum"], past)
        batch, here, mean = loader.batch(step), [p.detach().clone() for p in weights], mean_of(parts)
        g = gradients(batch)
        if previous is not None:
            go_to(previous)
            before = gradients(batch)
            go_to(here)
        for gamma in GAMMAS:
            if previous is None:
                shadows[gamma] = [layer.clone() for layer in g]
            else:
                for m, new, old in zip(shadows[gamma], g, before, strict=True):
                    m.mul_(beta).add_(new, alpha=1 - beta).add_(new - old, alpha=gamma * beta)
        for p, gradient in zip(weights, g, strict=True):
            p.grad = gradient
        optimizer.step()
        there = [p.detach().clone() for p in weights]
        pool_losses.append(loss)
        next_loss, next_parts = pool_gradients()
        for i, (name, norm) in enumerate(zip(names, norms, strict=True)):
            found = compare(norm, here[i], there[i], [part[i] for part in parts], [part[i] for part in next_parts])
            errors = {f"error_{gamma:g}": float(norm.dual_norm(shadows[gamma][i] - mean[i])) for gamma in GAMMAS}
            add(name, **vars(found), **errors)
        if step in probes:
            for scale in PROBE_SCALES:
                go_to([a + scale * (b - a) for a, b in zip(here, there, strict=True)])
                at = [p.detach().clone() for p in weights]
                _, far = pool_gradients()
                for i, (name, norm) in enumerate(zip(names, norms, strict=True)):
                    found = compare(norm, here[i], at[i], [part[i] for part in parts], [part[i] for part in far])
                    probed.append({"update": step, "scale": scale, "layer": name, **vars(found)})
            go_to(there)
        previous, loss, parts = here, next_loss, next_parts
        if step % 10 == 0 or step + 1 == config.steps:
            say(f"update {step + 1} of {config.steps}: pool loss {loss:.4f}, {time.monotonic() - started:.0f} s")
    loader.close()
    return {
        "config": config.to_dict(),
        "momentum": optimizer.param_groups[0]["momentum"],
        "pool": pool,
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started, 1),
        "pool_loss": [*pool_losses, loss],
        "norms": {name: norm.name for name, norm in zip(names, norms, strict=True)},
        "layers": layers,
        "probes": probed,
    }


def bias_corrected(beta: float, weight: float) -> tuple[float, float]:
    """(β_k, W_k) from β and W_{k-1}: β_k is the weight of the past in a bias-corrected average that starts from zero."""
    total = beta * weight + 1 - beta
    return beta * weight / total, total


# ---- tables and pictures


def kind_of(name: str) -> str:
    """`blocks.2.attention.q.weight` is a `q`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def fits(result: dict) -> dict[str, Fit]:
    """The fit of each layer, over the updates from FIRST on."""
    first = _first(result)
    return {name: fit_line(series["gradient"][first:], series["ratio"][first:]) for name, series in result["layers"].items()}


def _first(result: dict) -> int:
    return min(FIRST, len(result["pool_loss"]) // 2 - 1)


def _kinds(result: dict) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for name in result["layers"]:
        kinds.setdefault(kind_of(name), []).append(name)
    return {kind: kinds[kind] for kind in sorted(kinds, key=lambda kind: kind == "embedding")}


def _median(result: dict, names: list[str], key: Callable[[dict[str, list[float]]], np.ndarray], since: float = 0.5) -> float:
    """The median over layers and over the updates after the share `since` of the run."""
    start = int(since * len(next(iter(result["layers"].values()))["ratio"]))
    return float(np.median([key({k: v[start:] for k, v in result["layers"][name].items()}) for name in names]))


def noise_ratio(result: dict) -> float:
    """S/σ, the median over layers and the second half of the run."""
    return _median(result, list(result["layers"]), _over("difference_noise", "sigma"))


def _over(upper: str, lower: str) -> Callable[[dict[str, list[float]]], np.ndarray]:
    return lambda series: np.asarray(series[upper]) / np.maximum(np.asarray(series[lower]), 1e-30)


def table(result: dict) -> str:
    """Two tables in Markdown: the fits, and the noise, each by kind of layer."""
    found, kinds = fits(result), _kinds(result)
    fitted = [["layers", "L0", "L1", "points covered", "gain of L1", "ratio, median", "ratio, largest over smallest"]]
    for kind, names in kinds.items():
        ratios = [np.asarray(result["layers"][name]["ratio"][_first(result) :]) for name in names]
        of_layers = [
            _range([found[n].l0 for n in names]),
            _range([found[n].l1 for n in names]),
            _range([found[n].covered for n in names], ".0%"),
            _range([found[n].gain for n in names], ".0%"),
            _range([float(np.median(r)) for r in ratios]),
            _range([float(r.max() / r.min()) for r in ratios]),
        ]
        fitted.append([f"{kind} ({result['norms'][names[0]]})", *of_layers])
    noisy = [["layers", "noise σ/‖∇f‖", "difference ‖Δ‖/‖∇f‖", "its noise S/‖Δ‖", "S/σ", "mean-squared smoothness"]]
    noisy[0] += [f"error, γ = {gamma:g}" for gamma in GAMMAS]
    for kind, names in kinds.items():
        numbers = [
            _median(result, names, _over("sigma", "gradient")),
            _median(result, names, lambda s: np.multiply(s["ratio"], s["distance"]) / np.asarray(s["gradient"])),
            _median(result, names, lambda s: np.asarray(s["difference_noise"]) / np.multiply(s["ratio"], s["distance"])),
            _median(result, names, _over("difference_noise", "sigma")),
            _median(result, names, _over("difference_noise", "distance")),
            *(_median(result, names, _over(f"error_{gamma:g}", "gradient")) for gamma in GAMMAS),
        ]
        noisy.append([kind, *(f"{number:.3g}" for number in numbers)])
    return f"{markdown(fitted)}\n{markdown(noisy)}"


def _range(values: list[float], form: str = ".3g") -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} … {high}"


def draw(result: dict, out: Path) -> None:
    """`smoothness.png` (ratio against dual gradient norm, with the fits) and `noise.png`."""
    with pyplot().rc_context({**LOOK, "font.size": 10, "legend.frameon": False}):
        _draw_smoothness(result, out / "smoothness.png")
        _draw_noise(result, out / "noise.png")


def _draw_smoothness(result: dict, path: Path) -> None:
    plt = pyplot()
    found, kinds = fits(result), _kinds(result)
    columns = 4
    figure, grid = plt.subplots(-(-len(kinds) // columns), columns, figsize=(14, 7), layout="constrained", squeeze=False)
    for panel, (kind, names) in zip(grid.flat, kinds.items(), strict=False):
        for number, name in enumerate(names):
            series, fit, colour = result["layers"][name], found[name], COLOURS[number % len(COLOURS)]
            x, y = (np.asarray(series[key][_first(result) :]) for key in ("gradient", "ratio"))
            panel.scatter(x, y, s=11, color=colour, alpha=0.55, linewidths=0)
            ends = np.linspace(x.min(), x.max(), 50)
            label = f"{f'block {number}: ' if len(names) > 1 else ''}{fit.l0:.2g} + {fit.l1:.2g} ‖∇f‖"
            panel.plot(ends, fit.l0 + fit.l1 * ends, color=colour, linewidth=1.7, label=label)
        panel.set_title(f"{kind} ({result['norms'][names[0]]} norm)", fontsize=11, loc="left")
        panel.set_xlabel("dual norm of the gradient")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.margins(y=0.1)
        panel.tick_params(length=0)
        panel.legend(fontsize=8, loc="best", handlelength=1.2)
    for panel in grid.flat[len(kinds) :]:
        panel.axis("off")
    for row in grid:
        row[0].set_ylabel("‖∇f(X′) − ∇f(X)‖ dual over ‖X′ − X‖")
    figure.suptitle("Smoothness along a run of Gluon, one point an update, with the fitted L⁰ + L¹ ‖∇f‖", fontweight="bold")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _draw_noise(result: dict, path: Path) -> None:
    from matplotlib import ticker

    plt = pyplot()

    kinds = _kinds(result)
    hidden = [name for name in result["layers"] if kind_of(name) != "embedding"]
    figure, grid = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    panels = list(grid.flat)
    for number, (kind, names) in enumerate(kinds.items()):
        for panel, upper, lower in ((panels[0], "sigma", "gradient"), (panels[1], "difference_noise", "sigma")):
            values = np.median([_over(upper, lower)(result["layers"][name])[1:] for name in names], axis=0)
            panel.plot(range(1, len(values) + 1), values, color=COLOURS[number % len(COLOURS)], linewidth=1.5, label=kind)
    panels[0].set_title("Noise of a gradient, σ / ‖∇f‖", fontsize=11, loc="left")
    panels[1].set_title("Noise of a difference over σ, S / σ", fontsize=11, loc="left")
    alpha = 1 - result["momentum"]
    panels[1].axhline(alpha, color="#333333", linewidth=1, linestyle=":")
    panels[1].text(1, alpha, " 1 − β", va="bottom", fontsize=9)
    panels[0].legend(fontsize=8, ncols=2)
    for number, gamma in enumerate(GAMMAS):
        for names, style, what in ((hidden, "-", "blocks"), (kinds.get("embedding", []), "--", "embedding")):
            if names:
                values = [_over(f"error_{gamma:g}", "gradient")(result["layers"][name])[1:] for name in names]
                label = f"γ = {gamma:g}, {what}"
                middle = np.median(values, axis=0)
                panels[2].plot(range(1, len(middle) + 1), middle, style, color=COLOURS[number], linewidth=1.5, label=label)
    panels[2].set_title("Error of the momentum, ‖M − ∇f‖ / ‖∇f‖", fontsize=11, loc="left")
    panels[2].legend(fontsize=8)
    for panel in panels[:3]:
        panel.set_xlabel("update")
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(ticker.NullLocator())
    updates = sorted({probe["update"] for probe in result["probes"]})
    for number, update in enumerate(updates):
        for key, style, what in (("ratio", "-", "‖Δ‖/‖ΔX‖"), ("noise", "--", "S/‖ΔX‖")):
            points = []
            for scale in sorted({*PROBE_SCALES, 1.0}):
                values = [_probe(result, name, update, scale, key) / _probe(result, name, update, 1.0, key) for name in hidden]
                points.append((scale, float(np.median(values))))
            panels[3].plot(*zip(*points, strict=True), style, color=COLOURS[number], marker="o", markersize=4, linewidth=1.5,
                           label=f"update {update}, {what}")  # fmt: skip
    panels[3].set_title("Other step lengths: ratios of the blocks over those at the run's own step", fontsize=11, loc="left")
    panels[3].set_xscale("log", base=2)
    panels[3].xaxis.set_major_formatter("{x:g}")
    panels[3].set_xlabel("length of the step over the run's")
    panels[3].set_ylim(bottom=0)
    if updates:
        panels[3].legend(fontsize=8)
    for panel in panels:
        panel.tick_params(length=0, which="both")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _probe(result: dict, name: str, update: int, scale: float, key: str) -> float:
    if scale == 1.0:
        series = {k: v[update] for k, v in result["layers"][name].items()}
    else:
        series = next(p for p in result["probes"] if (p["layer"], p["update"], p["scale"]) == (name, update, scale))
    return series["ratio"] if key == "ratio" else series["difference_noise"] / series["distance"]


def _short(value: object) -> object:
    """The value with its floats rounded to five significant digits, enough for a file that is kept."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    return [_short(inner) for inner in value] if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(
        prog="experiments.smoothness", description="Layer-wise smoothness and noise along a run of Gluon.",
        epilog="Any option of train_gpt.py can be given too.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart_gluon.py"), help="default: quickstart_gluon")
    parser.add_argument("--pool", type=int, default=8, help="micro-batches of the full gradient, default: %(default)s")
    parser.add_argument("--probe", default="10,40,75", help="updates at which the step length is varied, default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "smoothness", help="default: results/smoothness")
    parser.add_argument("--replot", action="store_true", help="draw again from the JSON in --out")
    options, others = parser.parse_known_args(arguments)
    path = options.out / "smoothness.json"
    if options.replot:
        with as_written(path, "run without --replot"):
            result = json.loads(path.read_bytes())
            draw(result, options.out)
    else:
        try:
            probes = [int(part) for part in options.probe.split(",") if part.strip()]
        except ValueError:
            raise UserError(f"--probe is a list of updates such as 10,40, not {options.probe!r}") from None
        config = load_config(["--config", options.config, *others])
        options.out.mkdir(parents=True, exist_ok=True)
        result = _short(measure(config, options.pool, probes, lambda line: print(line, file=sys.stderr, flush=True)))
        write_text(path, json.dumps(result, separators=(",", ":")) + "\n")
        draw(result, options.out)
    print(table(result))


if __name__ == "__main__":
    with one_line_errors("experiments.smoothness"):
        main()
