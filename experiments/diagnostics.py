"""Measure what momentum variance reduction does during a short run, and draw it.

    python -m experiments.diagnostics --config configs/quickstart_mvr2.py --steps 80
    python -m experiments.diagnostics --draw results/diagnostics/quickstart_*.jsonl --out results/diagnostics/quickstart.png

The run is a plain loop in one process over the config's data, model, optimizer and schedule. Any option of the config can be
overridden. Every N steps it writes one line of results/diagnostics/RUN.jsonl. The measurements restore weights, gradients and
random state, so the run is the same as without them.

After step k, the weights X_k, the previous weights X_{k-1}, this batch ξ_k and the previous batch ξ_{k-1} give the three
differences that the variants use as corrections, g_k - ĝ_k with g_k = ∇f(X_k; ξ_k) and

    same             ĝ_k = ∇f(X_{k-1}; ξ_k)         MVR-1, -2, -3
    single_batch     ĝ_k = ∇f(X_{k-1}; ξ_{k-1})
    previous_batch   ĝ_k = ∇f(X_k; ξ_{k-1})

A reference batch that the run does not train on stands for ∇f. Every batch is evaluated in two halves, whose noises are
independent, so that squared errors are estimated without bias.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import Parser, UserError, as_written, one_line_errors
from common.jsons import jsonable
from common.pictures import COLOURS, INK, LOOK, STYLES, pyplot
from experiments.comparison import RESULTS
from experiments.setup import batches, build
from optim import Gluon, PreviousBatchMVR, SingleBatchMVR
from training.config import Config, load_config
from training.optimizers import schedule

KINDS = ("same", "single_batch", "previous_batch")
Gradients = list[Tensor]  # one for each parameter
Halves = tuple[Gradients, Gradients]  # of two independent halves of a batch
Batch = tuple[Tensor, Tensor]


# Estimators -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def snapshot(params: Sequence[Tensor]) -> Gradients:
    """Copies of the weights."""
    return [p.detach().clone() for p in params]


def gradient(params: Sequence[Tensor], closure: Callable[[], Any], weights: Sequence[Tensor]) -> Gradients:
    """The gradient that `closure` leaves at `weights`; None counts as zero.

    Values, `.grad` and the random state are put back, so each call sees the same dropout masks.
    """
    kept, gradients = snapshot(params), [p.grad for p in params]
    devices = {p.device for p in params if p.device.type == "cuda"}
    try:
        _set(params, weights, [None] * len(kept))
        with torch.random.fork_rng(devices), torch.enable_grad():
            closure()
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in params]
    finally:
        _set(params, kept, gradients)


@torch.no_grad()
def _set(params: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for p, w, g in zip(params, weights, gradients, strict=True):
        p.copy_(w)
        p.grad = g


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """⟨a, b⟩ over all entries, summed in float64."""
    return math.fsum(torch.dot(x.flatten().double(), y.flatten().double()).item() for x, y in zip(a, b, strict=True))


def minus(a: Sequence[Tensor], b: Sequence[Tensor]) -> Gradients:
    return [x - y for x, y in zip(a, b, strict=True)]


def mean(halves: Halves) -> Gradients:
    return [(x + y) / 2 for x, y in zip(*halves, strict=True)]


def relative_size(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """‖a‖/‖b‖ (Euclidean), such as ‖g - ĝ‖/‖g‖; nan if b = 0."""
    return math.sqrt(_over(inner(a, a), inner(b, b)))


def best_gamma(d1: Sequence[Tensor], d2: Sequence[Tensor]) -> float:
    """γ* = ⟨d₁, d₂⟩ / ‖(d₁+d₂)/2‖², from the d = g - ĝ of two independent halves of a batch.

    With Δ = E d, the change of the true gradient, E‖Δ - γ d‖² is least at γ = ‖Δ‖²/E‖d‖², and ⟨d₁, d₂⟩ is an unbiased
    estimate of ‖Δ‖². γ* is for one step: it ignores the error that the momentum already has. nan if d = 0.
    """
    both = mean((list(d1), list(d2)))
    return _over(inner(d1, d2), inner(both, both))


def noise(halves: Halves) -> float:
    """√E‖h - E h‖² of the mean h of two independent halves."""
    gap = minus(*halves)
    return math.sqrt(inner(gap, gap)) / 2


def tracking_error(estimate: Sequence[Tensor], target: Halves) -> float:
    """‖M - ∇f‖²/‖∇f‖² from two independent estimates of ∇f, whose own noise drops out of both products."""
    return _over(inner(minus(estimate, target[0]), minus(estimate, target[1])), inner(*target))


def cosine(estimate: Sequence[Tensor], target: Halves) -> float:
    """The cosine of an estimate and ∇f; the noise of the target drops out."""
    squared = inner(estimate, estimate) * inner(*target)
    return inner(estimate, mean(target)) / math.sqrt(squared) if squared > 0 else math.nan


def _over(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


# The run --------------------------------------------------------------------------------------------------------------


class Evaluation:
    """Gradients of batches in two halves. `loss` is the last batch's."""

    def __init__(self, model: nn.Module, params: Sequence[Tensor]) -> None:
        self.model, self.params, self.loss = model, params, math.nan

    def closure(self, inputs: Tensor, targets: Tensor, low: bool = False) -> Callable[[], Tensor]:
        """The mean loss and its gradient; `low`: under bfloat16 autocast."""

        def evaluate() -> Tensor:
            with torch.autocast(inputs.device.type, torch.bfloat16) if low else nullcontext():
                loss = self.model(inputs, targets)
            loss.backward()
            self.loss = loss.item()
            return loss

        return evaluate

    def halves(self, batch: Batch, weights: Gradients, low: bool = False) -> Halves:
        half, losses, found = len(batch[0]) // 2, [], []
        for rows in (slice(None, half), slice(half, None)):
            found.append(gradient(self.params, self.closure(*(part[rows] for part in batch), low), weights))
            losses.append(self.loss)
        self.loss = sum(losses) / 2
        return found[0], found[1]


def momentum_of(optimizer: Gluon, params: Sequence[Tensor], last: Callable[[], Gradients]) -> Gradients:
    """M_k, the LMO's input in the last step. `last`: this batch's gradient at the weights that the method needs.

    single_batch keeps E, and M = (1-γ) E + γ g, where g is the gradient before the update. previous_batch has already
    subtracted γ ĝ, where ĝ is the gradient after the update.
    """
    found = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
    gamma = optimizer.param_groups[0].get("gamma", 0.0)
    if isinstance(optimizer, SingleBatchMVR):
        return [m.lerp(g, gamma) for m, g in zip(found, last(), strict=True)]
    if isinstance(optimizer, PreviousBatchMVR):
        return [m.add(g, alpha=gamma) for m, g in zip(found, last(), strict=True)]
    return found


def measure(
    optimizer: Gluon, evaluation: Evaluation, weights: tuple[Gradients, Gradients, Gradients], batches: tuple[Batch, Batch],
    reference: Batch,
) -> dict[str, Any]:  # fmt: skip
    """The record of step k. `weights`: X_{k-1}, X_k and the model's present weights. `batches`: ξ_{k-1} and ξ_k."""
    params = evaluation.params
    (then, now, held), (old, new) = weights, batches

    def differences(low: bool) -> tuple[Halves, dict[str, Halves]]:
        g = evaluation.halves(new, now, low)
        places = {"same": (new, then), "single_batch": (old, then), "previous_batch": (old, now)}
        hats = {kind: evaluation.halves(*place, low) for kind, place in places.items()}
        return g, {kind: (minus(g[0], hat[0]), minus(g[1], hat[1])) for kind, hat in hats.items()}

    g, exact = differences(low=False)
    _, low = differences(low=True)
    before = evaluation.halves(reference, then)
    loss_before = evaluation.loss
    target = evaluation.halves(reference, now)
    loss_now = evaluation.loss
    at = now if isinstance(optimizer, SingleBatchMVR) else held
    momentum = momentum_of(optimizer, params, lambda: mean(evaluation.halves(new, at)))
    estimate = [optimizer.state[p]["estimate"] for p in params if "estimate" in optimizer.state[p]]
    predicted = inner(mean(before), minus(now, then))
    sigma = noise(g)
    return {
        "update": optimizer.updates,
        "reference_loss": loss_now,
        "best_gamma": {kind: best_gamma(*d) for kind, d in exact.items()},
        # ‖g - ĝ‖/‖g‖, its noise over the gradient's (S/σ), and how far bfloat16 is off: ‖d̃ - d‖/‖d‖.
        "relative_difference": {kind: relative_size(mean(d), mean(g)) for kind, d in exact.items()},
        "noise_ratio": {kind: _over(noise(d), sigma) for kind, d in exact.items()},
        "rounding_noise": {kind: relative_size(minus(mean(low[kind]), mean(exact[kind])), mean(exact[kind])) for kind in KINDS},
        # ‖·-∇f‖²/‖∇f‖² of M_k, of d_k (MVR-2, -3) and of g_k, at X_k.
        "momentum_error": tracking_error(momentum, target),
        "estimate_error": tracking_error(estimate, target) if len(estimate) == len(params) else None,
        "gradient_error": tracking_error(mean(g), target),
        "momentum_cosine": cosine(momentum, target),
        "gradient_cosine": cosine(mean(g), target),
        # For the update that led to X_k, on the reference batch: the loss's change to first order, and the rest of the change.
        "first_order": predicted,
        "curvature": loss_now - loss_before - predicted,
    }


def run(config: Config, every: int, reference: int, out: Path) -> list[dict[str, Any]]:
    """Train, measure every `every` steps, and write each record at once."""
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    loader = batches(config, device)
    count = -(-reference // config.batch_size)
    if config.batch_size % 2 or config.steps + count > loader.steps:
        raise UserError("needs an even --batch-size, and data for --steps and the reference batch after them")
    unseen = [loader.batch(config.steps + i) for i in range(count)]
    target = tuple(torch.cat(parts)[: reference // 2 * 2] for parts in zip(*unseen, strict=True))

    model, optimizer = build(config, device)
    if not isinstance(optimizer, Gluon) or any(group["norm"] == "adamw" for group in optimizer.param_groups):
        raise UserError(f"measures Gluon and its variants, not {config.optimizer}; choose one with --optimizer")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    evaluation, set_step = Evaluation(model, params), schedule(optimizer, config)
    records, last_batch, last_weights = [], None, None
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with out.open("w") as file:
        for step in range(config.steps):
            batch, held = loader.batch(step), snapshot(params)
            set_step(step)
            optimizer.step(evaluation.closure(*batch))
            weights = snapshot(params) if optimizer.deferred else held  # X_k
            if step and step % every == 0:
                record = measure(optimizer, evaluation, (last_weights, weights, snapshot(params)), (last_batch, batch), target)
                records.append(jsonable(record | {"update": step}))
                file.write(json.dumps(records[-1], allow_nan=False) + "\n")
                file.flush()
                print(f"{step:5d}  loss {record['reference_loss']:.3f}  {time.monotonic() - start:.0f} s", flush=True)
            last_batch, last_weights = batch, weights
    loader.close()
    return records


PANELS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "Loss on the reference batch": lambda r: r["reference_loss"],
    "γ* of one step": lambda r: r["best_gamma"]["same"],
    "‖g - ĝ‖ / ‖g‖": lambda r: r["relative_difference"]["same"],
    "S/σ, noise of g - ĝ over that of g": lambda r: r["noise_ratio"]["same"],
    "bfloat16's rounding error / ‖g - ĝ‖": lambda r: r["rounding_noise"]["same"],
    "‖M - ∇f‖² / ‖∇f‖²": lambda r: r["momentum_error"],
    "Cosine of M and ∇f": lambda r: r["momentum_cosine"],
    "Share of an update's gain that curvature takes back": lambda r: (
        None if r["curvature"] is None or not r["first_order"] else -r["curvature"] / r["first_order"]
    ),
}


def read(path: Path) -> list[dict[str, Any]]:
    """The records in a file. Raises UserError if a panel cannot be drawn from one."""
    with as_written(path, "--draw takes files that this command wrote"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            for value in PANELS.values():
                value(record)
    return records


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Draw eight panels, with a line for each run; the differences are those of `same`."""
    plt = pyplot()
    with plt.rc_context({**LOOK, "font.size": 10}):
        figure, axes = plt.subplots(2, 4, figsize=(17, 7), layout="constrained")
        for panel, (title, value) in zip(axes.flat, PANELS.items(), strict=True):
            for i, (name, records) in enumerate(runs.items()):
                points = [(r["update"], value(r)) for r in records if value(r) is not None]
                style, colour = STYLES[i % len(STYLES)], COLOURS[i % len(COLOURS)]
                panel.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=3.5, lw=1.6, label=f" {name}")
            panel.set_title(title, fontsize=10.5)
            panel.set_xlabel("Updates")
            panel.tick_params(length=0)
        axes[1, 3].axhline(1, color=INK, linewidth=0.8)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
        plt.close(figure)


def main(argv: list[str]) -> None:
    """Measure a run, or draw records."""
    parser = Parser(
        prog="experiments.diagnostics", description=__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="All other options go to the config: see train_gpt.py --help.",
    )  # fmt: skip
    parser.add_argument("--every", type=int, default=10, help="steps between measurements (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=32, help="sequences of the reference batch (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS / "diagnostics", help="of the records (results/diagnostics)")
    parser.add_argument("--draw", nargs="+", type=Path, metavar="FILE", help="draw these records instead of training")
    parser.add_argument("--out", type=Path, help="picture (default: the run's name in the folder)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.every < 1 or arguments.reference < 2:
        raise UserError("--every must be at least 1 and --reference at least 2")
    if arguments.draw:
        if rest:
            raise UserError(f"{rest[0]} has no effect with --draw; leave it out")
        runs = {path.stem: read(path) for path in arguments.draw}
    else:
        config = load_config(rest)
        path = arguments.folder / f"{config.run_name}.jsonl"
        runs = {config.run_name: run(config, arguments.every, arguments.reference, path)}
    out = arguments.out or arguments.folder / f"{next(iter(runs))}.png"
    draw(runs, out)
    print(out)


if __name__ == "__main__":
    with one_line_errors("experiments.diagnostics"):
        main(sys.argv[1:])
