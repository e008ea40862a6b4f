"""Measure along a short run what momentum variance reduction does, and draw it.

    python scripts/diagnose.py --config configs/quickstart_mvr2.py --steps 80
    python scripts/diagnose.py --draw results/diagnostics/quickstart_*.jsonl --out results/diagnostics/quickstart.png

The run is a plain loop in one process over the config's data, model, optimizer and schedule; any option of the config can
be overridden. Every N steps it measures, with copies of the weights of the last steps, into one line of
results/diagnostics/<run>.jsonl; what each number is stands in `measure` and in optim/diagnostics.py.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from plot import COLOURS, INK, LOOK, STYLES
from torch import Tensor, nn

from common.errors import UserError, one_line_errors
from data import embedded
from data.loader import BatchLoader, TokenStream
from data.shards import list_shards
from model import GPT, GPTConfig
from optim import Gluon
from optim import diagnostics as diag
from train_gpt import build_optimizer, set_schedule
from training.config import Config, load_config

WINDOW = 10  # updates over which the efficiency of the path is measured
Gradients = list[Tensor]


class Evaluation:
    """Closures over batches: each adds the gradient of the mean loss to `.grad` and keeps that loss."""

    def __init__(self, model: nn.Module, micro: int, device: torch.device) -> None:
        self.model, self.micro, self.device = model, micro, device
        self.loss = math.nan

    def closure(self, inputs: Tensor, targets: Tensor, low: bool = False) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            total = torch.zeros((), device=self.device)
            for x, y in zip(inputs.split(self.micro), targets.split(self.micro), strict=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=low):
                    loss = self.model(x, y) * (len(x) / len(inputs))
                loss.backward()
                total += loss.detach()
            self.loss = total.item()
            return total

        return evaluate

    def halves(self, batch: tuple[Tensor, Tensor], low: bool = False) -> list[Callable[[], Tensor]]:
        """One closure for each half of a batch."""
        half = len(batch[0]) // 2
        return [self.closure(batch[0][i : i + half], batch[1][i : i + half], low) for i in (0, half)]


def measure(
    optimizer: Gluon,
    model: nn.Module,
    evaluation: Evaluation,
    history: dict[int, Gradients],
    batches: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    reference: tuple[Tensor, Tensor],
    momentum: Gradients,
    kind: str,
) -> dict[str, Any]:
    """The record of update k = max(history), from X_k, X_{k-1}, …, (ξ_k, ξ_{k-1}), M_{k-1} and a reference batch."""
    params = diag.parameters(optimizer)
    k = max(history)
    now, then = history[k], history[k - 1]
    beta = optimizer.param_groups[0]["momentum"]

    def at(batch: tuple[Tensor, Tensor], weights: Gradients, low: bool = False) -> tuple[tuple[Gradients, Gradients], float]:
        """The gradients of a batch's halves, and its loss."""
        gradients, losses = [], []
        for closure in evaluation.halves(batch, low):
            gradients.append(diag.gradient(params, closure, weights))
            losses.append(evaluation.loss)
        return (gradients[0], gradients[1]), sum(losses) / 2

    def minus(a: tuple[Gradients, Gradients], b: tuple[Gradients, Gradients]) -> tuple[Gradients, Gradients]:
        return tuple([x - y for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True))

    def mean(a: tuple[Gradients, Gradients]) -> Gradients:
        return [(x + y) / 2 for x, y in zip(*a, strict=True)]

    def differences(low: bool) -> tuple[tuple[Gradients, Gradients], dict[str, tuple[Gradients, Gradients]]]:
        """g, and g - ĝ of each kind."""
        new, old = batches
        g = at(new, now, low)[0]
        hats = {"mvr1": (old, then), "mvr2": (new, then), "mvr3": (old, now)}
        return g, {name: minus(g, at(*place, low)[0]) for name, place in hats.items()}

    g, exact = differences(low=False)
    _, low = differences(low=True)
    gradients_now, loss_now = at(reference, now)
    gradients_then, loss_then = at(reference, then)
    moves = {j: [a - b for a, b in zip(history[j], history[j - 1], strict=True)] for j in history if j - 1 in history}
    window = [j for j in sorted(moves) if j > k - WINDOW]

    def over_layers(value: Callable[[int], float]) -> float:
        """The mean over the layers that moved."""
        values = [v for v in map(value, range(len(params))) if math.isfinite(v)]
        return sum(values) / len(values) if values else math.nan

    def median(value: Callable[[int], float]) -> float:
        values = [v for v in map(value, range(len(params))) if math.isfinite(v)]
        return statistics.median(values) if values else math.nan

    def error(m: Tensor, target: tuple[Gradients, Gradients], i: int) -> float:
        return diag.tracking_error([m], [target[0][i]], [target[1][i]])

    def cosine(m: Tensor, target: tuple[Gradients, Gradients], i: int) -> float:
        a, b = target[0][i], target[1][i]
        squared = diag.inner(m, m) * diag.inner(a, b)  # the two halves' noise drops out
        return diag.inner(m, (a + b) / 2) / math.sqrt(squared) if squared > 0 else math.nan

    def length(a: Tensor) -> float:
        return math.sqrt(diag.inner(a, a))

    def turn(i: int) -> float:
        a, b = moves[k][i], moves[k - 1][i]
        return diag.inner(a, b) / (length(a) * length(b)) if length(a) * length(b) else math.nan

    def efficiency(i: int) -> float:
        path = sum(length(moves[j][i]) for j in window)
        return length(sum(moves[j][i] for j in window)) / path if path else math.nan

    def with_memory(d: Gradients, i: int) -> float:
        return diag.best_gamma_with_memory([momentum[i]], [mean(g)[i]], [d[i]], [mean(gradients_now)[i]], beta)

    predicted = diag.inner(mean(gradients_then), moves[k])
    d = exact[kind]
    record = {
        "update": k,
        "reference_loss": loss_now,
        # γ* of each kind, over all parameters; median over the layers of the γ that would bring M_k nearest to ∇f.
        "best_gamma": {name: diag.best_gamma(*x) for name, x in exact.items()},
        "best_gamma_with_memory": {name: median(partial(with_memory, mean(x))) for name, x in exact.items()},
        # ‖g - ĝ‖/‖g‖, and what bfloat16 makes of g - ĝ.
        "relative_difference": {name: diag.relative_size(mean(x), mean(g)) for name, x in exact.items()},
        "rounding_noise": {name: diag.rounding_noise(mean(x), mean(low[name])) for name, x in exact.items()},
        # Medians over the layers, ‖·-∇f‖²/‖∇f‖² and the cosine with ∇f: of the momentum M_{k-1} at X_{k-1}, and of g_k at X_k.
        "momentum_error": median(lambda i: error(momentum[i], gradients_then, i)),
        "gradient_error": median(lambda i: error(mean(g)[i], gradients_now, i)),
        "momentum_cosine": median(lambda i: cosine(momentum[i], gradients_then, i)),
        "gradient_cosine": median(lambda i: cosine(mean(g)[i], gradients_now, i)),
        # Mean over the layers: cosine of the last two updates; length of the way over the length of the path.
        "turn": over_layers(turn) if k - 1 in moves else math.nan,
        "efficiency": over_layers(efficiency),
        # Of the last update, on the reference batch: the first-order change of the loss, and what came on top.
        "first_order": predicted,
        "curvature": loss_now - loss_then - predicted,
        "layers": [asdict(layer) for layer in diag.layers(optimizer, model.named_parameters(), momentum, g, d, low[kind])],
    }
    return _finite(record)


def run(config: Config, every: int, reference: int, out: Path) -> list[dict[str, Any]]:
    """Train, measure every so many updates, and write the records as they come."""
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    if config.text and not list_shards(config.data_dir):
        embedded.prepare(config.data_dir)
    stream = TokenStream(config.data_dir, "train")
    options = {"seq_len": config.seq_len, "device": device, "vocab_size": config.vocab_size}
    loader = BatchLoader(stream, batch_size=config.batch_size, shuffle_seed=config.seed if config.shuffle else None, **options)
    if config.batch_size % 2 or config.steps + -(-reference // config.batch_size) > loader.steps:
        raise UserError("needs an even --batch-size, and data for --steps and the reference batch after them")
    unseen = [loader.batch(config.steps + i) for i in range(-(-reference // config.batch_size))]
    target = tuple(torch.cat(parts)[: reference // 2 * 2] for parts in zip(*unseen, strict=True))

    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len)).to(device)
    optimizer = build_optimizer(model, config)
    params = diag.parameters(optimizer)
    evaluation = Evaluation(model, min(config.micro_batch_size, 8), device)
    kind = config.optimizer if config.optimizer in diag.KINDS else "mvr2"
    history = {0: diag.snapshot(params)}
    records, previous = [], None
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with out.open("w") as file:
        for step in range(config.steps):
            batch = loader.batch(step)
            set_schedule(optimizer, config, step)
            momentum = None
            if step and step % every == 0:  # M_{k-1}, before the step of ξ_k changes it
                again = evaluation.closure(*previous)
                at = history[step - 1] if config.optimizer == "mvr1" else None
                extra = diag.gradient(params, again, at) if config.optimizer in ("mvr1", "mvr3") else None
                momentum = diag.momenta(optimizer, extra)

            def record(kept: dict[int, Gradients], momentum: Gradients = momentum, batches: tuple = (batch, previous)) -> None:
                values = measure(optimizer, model, evaluation, kept, batches, target, momentum, kind)
                records.append(values)
                file.write(json.dumps(values, allow_nan=False) + "\n")
                file.flush()
                print(
                    f"{values['update']:5d}  loss {values['reference_loss']:.3f}  γ* {_text(values['best_gamma'][kind])}  "
                    f"cosine of M and ∇f {_text(values['momentum_cosine'])}  turn {_text(values['turn'])}  "
                    f"{time.monotonic() - start:.0f} s",
                    flush=True,
                )

            # The model holds X_k before a step, with MVR-2 after it.
            if momentum is not None and config.optimizer != "mvr2":
                record(history)
            optimizer.step(evaluation.closure(*batch))
            history[optimizer.updates] = diag.snapshot(params)
            if momentum is not None and config.optimizer == "mvr2":
                record(history)
            history = {j: x for j, x in history.items() if j >= optimizer.updates - WINDOW - 1}
            previous = batch
    loader.close()
    return records


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Eight panels, one line a run; for a kind's own numbers, that of the run's optimizer (MVR-2's for others)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def kind(name: str) -> str:
        return next((kind for kind in diag.KINDS if kind in name), "mvr2")

    panels: dict[str, Callable[[str, dict[str, Any]], float | None]] = {
        "Loss on the reference batch": lambda _, r: r["reference_loss"],
        "γ* of one step, of the run's own g - ĝ": lambda name, r: r["best_gamma"][kind(name)],
        "‖g - ĝ‖ / ‖g‖": lambda name, r: r["relative_difference"][kind(name)],
        "bfloat16's rounding error / ‖g - ĝ‖": lambda name, r: r["rounding_noise"][kind(name)],
        "Cosine of the momentum and ∇f (median layer)": lambda _, r: r["momentum_cosine"],
        "Cosine of successive updates (mean over layers)": lambda _, r: r["turn"],
        "Loss that the last update gains to first order": lambda _, r: -r["first_order"],
        "Share of that gain that curvature takes back": lambda _, r: -r["curvature"] / r["first_order"],
    }
    with plt.rc_context({**LOOK, "font.size": 10}):
        figure, axes = plt.subplots(2, 4, figsize=(17, 7), layout="constrained")
        for panel, (title, value) in zip(axes.flat, panels.items(), strict=True):
            for i, (name, records) in enumerate(runs.items()):
                points = [(r["update"], value(name, r)) for r in records if value(name, r) is not None]
                panel.plot(
                    *zip(*points, strict=True), STYLES[i % len(STYLES)], color=COLOURS[i % len(COLOURS)], marker="osD^v"[i % 5],
                    markersize=3.5, linewidth=1.6, label=f" {name}",
                )  # fmt: skip
            panel.set_title(title, fontsize=10.5)
            panel.set_xlabel("Updates")
            panel.tick_params(length=0)
        for panel, level in ((axes[1, 1], 0), (axes[1, 3], 1)):
            panel.axhline(level, color=INK, linewidth=0.8)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
        plt.close(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="diagnose.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
        epilog="Every other option is the config's: see train_gpt.py --help.",
    )  # fmt: skip
    parser.add_argument("--every", type=int, default=10, help="updates between measurements (default: %(default)s)")
    parser.add_argument("--reference", type=int, default=32, help="sequences of the reference batch (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("results/diagnostics"), help="for the records (%(default)s)")
    parser.add_argument("--draw", nargs="+", type=Path, metavar="FILE", help="draw these records instead of training")
    parser.add_argument("--out", type=Path, help="picture (default: the run's name in the folder)")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.every < 1 or arguments.reference < 2:
        raise UserError("--every must be at least 1 and --reference at least 2")
    if arguments.draw:
        if rest:
            raise UserError(f"{rest[0]} means nothing with --draw")
        runs = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in arguments.draw}
    else:
        config = load_config(rest)
        path = arguments.folder / f"{config.run_name}.jsonl"
        runs = {config.run_name: run(config, arguments.every, arguments.reference, path)}
    out = arguments.out or arguments.folder / f"{next(iter(runs))}.png"
    draw(runs, out)
    print(out)


if __name__ == "__main__":
    with one_line_errors("diagnose"):
        main(sys.argv[1:])
