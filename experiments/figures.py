"""The figures of "Muon is Provably Faster with Momentum Variance Reduction": run or resume what is missing, and draw.

    python -m experiments.figures --figure 3 --scale mini --jobs 2     two cores
    python -m experiments.figures --figure 1 --dry-run                 what would run at full size, and how long it takes
    python -m experiments.figures --figure 1                           a GPU and FineWeb
    python -m experiments.figures --figure 4 --scale mini --plot-only  draw again, from the packed records

The protocol is the paper's: the baseline is Gluon at its recipe (β = 0.9, one constant lr), the variant runs at the same lr,
and the curves are compared at equal updates. They are also compared at equal gradient evaluations and at equal seconds, because
the variants take two gradients a step. Figures 1 and 2 show MVR-1 at B = 512 and B = 128, figure 3 MVR-2, figure 4 MVR-3 at
q = 0.5 and α = 0.8, in both readings of α. Where a caption gives no β or q, the figure shows several instead of a choice.

`full` is GPT-124M on FineWeb-10B (configs/gluon_b512.py). `mini` is the byte model of configs/mini_gluon.py at lr 2.5e-4:
8 sequences a step stand for B = 512, 2 for B = 128. `matched` is the same model with 64 and 16 sequences: 64 are near its
gradient noise scale, as 512 are believed to be near that of GPT-124M. A seed sets the initial weights and the order of the data
for all arms. Differences are paired by seed, with 95% intervals (Student's t). On the small model the baseline of figures 1 to
3 runs longer, twice as long if the text lasts, so that a variant's run can be compared with Gluon at equal gradients.

Runs go to runs/figures/, and what they measured is packed in results/figures/. Mini seconds are calibrated
(experiments.calibrate). Everything after `--` goes to train_gpt.py. A run takes one GPU. To give it several, start the commands
that --dry-run prints with torchrun in place of python; then this command finds the runs done, packs them and draws.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError, one_line_errors, positive
from common.tables import aligned
from experiments.comparison import (
    CONFIG,
    RESULTS,
    RUNS,
    Arm,
    Comparison,
    body,
    compare,
    read_speed,
    replace_section,
    study_parser,
    write,
)
from experiments.intervals import difference
from experiments.run_jobs import CONTINUES, ROOT, run_all, words_of
from experiments.setup import evaluations
from training.config import Config, load_config
from training.metrics import PEAK_FLOPS

LR = 2.5e-4
TEXT_STEPS = {2: 44000, 8: 11000, 16: 5600, 64: 1400}  # the longest run that the embedded text allows, by batch size
ASSUMED_TOKENS = 14000  # per second on one core, each evaluated once
PEAK, SHARE = PEAK_FLOPS["H100"], 0.4  # FLOP/s, and the assumed share of it
SHARD = 100_000_000
OWN = {"config", "overwrite", "resume", "results_dir", "run_name", "seed", "steps"}  # options of train_gpt.py

GLUON = Arm("gluon", "Gluon", {"optimizer": "gluon", "momentum": 0.9})
MVR1 = tuple(
    Arm(f"mvr1_beta{beta:g}", f"MVR-1, β {beta:g}", {"optimizer": "mvr1", "momentum": beta, "gamma": 1.0})
    for beta in (0.9, 0.5, 0.1)
)
MVR2 = tuple(Arm(f"mvr2_q{q:g}", f"MVR-2, q {q:g}", {"optimizer": "mvr2", "momentum": 0.9, "q": q}) for q in (0.5, 0.8))
MVR3 = tuple(
    Arm(f"mvr3_beta{b:g}", f"MVR-3, q 0.5, β {b:g}", {"optimizer": "mvr3", "momentum": b, "q": 0.5, "gamma": 1.0})
    for b in (0.2, 0.8)
)


@dataclass(frozen=True)
class Figure:
    """`batch`: sequences a step, by scale. `steps`, `baseline_steps`: updates at mini scale."""

    title: str
    batch: Mapping[str, int]
    variants: tuple[Arm, ...]
    steps: int = 1000
    baseline_steps: int = 2000


SMALL = ("mini", "matched")  # the scales of the small model
SCALES = ("full", *SMALL)
MATCHED_STEPS = 1000
B512, B128 = {"mini": 8, "matched": 64, "full": 512}, {"mini": 2, "matched": 16, "full": 128}
FIGURES = {
    1: Figure("Figure 1: Gluon and MVR-1, B = 512", B512, MVR1),
    2: Figure("Figure 2: Gluon and MVR-1, B = 128", B128, MVR1),
    3: Figure("Figure 3: Gluon and MVR-2, B = 512", B512, MVR2),
    4: Figure("Figure 4: Gluon and MVR-3, B = 512", B512, MVR3, 3000, 3000),
}


@dataclass(frozen=True)
class Folders:
    """The folders of runs and results."""

    runs: Path = RUNS
    results: Path = RESULTS

    @property
    def calibration(self) -> Path:
        return self.results / "figures" / "calibration.json"


def plan(number: int, scale: str, seeds: int, steps: int | None, folders: Folders, extra: Mapping[str, str]) -> Comparison:
    """What a figure runs at a scale."""
    figure = FIGURES[number]
    batch = figure.batch[scale]
    if scale == "full":
        common, config = {}, f"configs/gluon_b{batch}.py"
        length = steps or load_config(["--config", str(ROOT / config)]).steps
    else:
        common, config = {"lr": LR, "batch_size": batch}, CONFIG
        length = steps or (figure.steps if scale == "mini" else min(figure.steps, MATCHED_STEPS))
    arms = tuple(
        _with(replace(arm, options={**arm.options, **common}, config=config), extra) for arm in (GLUON, *figure.variants)
    )
    lengths = {arm.key: length for arm in arms}
    if scale != "full":
        lengths["gluon"] = min(length * figure.baseline_steps // figure.steps, TEXT_STEPS[batch])
    place = Path("figures") / scale / f"b{batch}"
    title = f"{figure.title}, {scale} scale"
    return Comparison(title, arms, tuple(range(seeds)), lengths, folders.runs / place, folders.results / place)


def _with(arm: Arm, extra: Mapping[str, str]) -> Arm:
    """The arm with more options, as train_gpt.py reads them. Raises UserError if it refuses them."""
    config = config_of(replace(arm, options={**arm.options, **extra}), 1)
    return replace(arm, options={**arm.options, **{name: getattr(config, name) for name in extra}})


# What it costs --------------------------------------------------------------------------------------------------------


def dry_run(comparison: Comparison, scale: str, speed: Mapping[str, Any] | None) -> str:
    """The runs, their cost and their commands, as text."""
    full = scale == "full"
    rows = [["arm", "B", "updates", "tokens", "gradients", *(("shards", "1 GPU", "8 GPUs") if full else ("1 core",))]]
    total, shards = 0.0, 0
    for arm in comparison.arms:
        config = config_of(arm, comparison.steps[arm.key])
        tokens = config.steps * config.batch_size * config.seq_len
        passes = evaluations(config.optimizer, config.steps)
        seconds = _seconds(arm, config, passes, full, speed)
        total, shards = total + seconds, max(shards, -(-(tokens + 1) // SHARD))
        times = (f"{-(-(tokens + 1) // SHARD)}", duration(seconds), duration(seconds / 8)) if full else (duration(seconds),)
        rows.append([arm.key, f"{config.batch_size}", f"{config.steps:,}", f"{tokens:,}", f"{passes:,}", *times])
    seeds = len(comparison.seeds)
    all_of_it = f"all of it, {seeds} seed{'s' if seeds > 1 else ''}: {duration(seeds * total)} of "
    if full:
        note = (
            f"{all_of_it}one GPU, at an assumed {SHARE:.0%} of the {PEAK / 1e12:.0f} TFLOP/s (bfloat16) of an H100 or H200.\n"
            f"Data: python -m data.fineweb --shards {shards}"
        )
    else:
        known = "results/figures/calibration.json" if speed else f"an assumed {ASSUMED_TOKENS:,} tokens a second and gradient"
        note = f"{all_of_it}one core, from {known}."
    commands = [comparison.job(arm, 0).line for arm in comparison.arms]
    return "\n".join([comparison.title, "", aligned(rows), "", note, "", *commands])


def config_of(arm: Arm, steps: int) -> Config:
    """An arm's full configuration, checked."""
    return load_config(["--config", str(ROOT / arm.config), *words_of({**arm.options, "steps": steps})])


def _seconds(arm: Arm, config: Config, passes: int, full: bool, speed: Mapping[str, Any] | None) -> float:
    tokens = passes * config.batch_size * config.seq_len
    if full:
        import torch

        from model import GPT, GPTConfig

        with torch.device("meta"):
            model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len))
        validations = (config.steps // config.val_every + 1) * config.val_tokens
        return model.flops_per_token(config.seq_len) * (tokens + validations / 3) / (SHARE * PEAK)
    if speed:
        return passes * speed["gradient"] + config.steps * speed["update"][arm.key]
    return tokens / ASSUMED_TOKENS


def duration(seconds: float) -> str:
    """Seconds as text, in a unit that suits them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# What came out --------------------------------------------------------------------------------------------------------


def signs(number: int, comparison: Comparison, speed: Mapping[str, Any] | None) -> list[str]:
    """Whether the paper's sign is seen, a line for each variant."""
    base = comparison.curves(comparison.baseline, speed)
    lines, (gluon, *rows) = [], compare(comparison, speed)
    for row in rows:
        if "equal_updates" not in row:  # no seed in common with the baseline yet
            continue
        own = comparison.curves(next(arm for arm in comparison.arms if arm.key == row["arm"]), speed)
        gap = row["equal_updates"]["difference"]
        seen = {"better": "seen", "worse": "not seen", "undecided": "undecided"}[gap.verdict]
        places = [u for u in next(iter(own.values())).updates if 0 < u <= row["equal_updates"]["budget"]]
        leads = {u: difference(own, base, "updates", u)[1].mean for u in places}
        ahead = sum(lead < 0 for lead in leads.values())
        best = min(leads, key=leads.get)
        lead = f"ahead at {ahead} of {len(leads)} validations, at most by {-leads[best]:.3f} (at {best:,.0f})"
        if not ahead:
            lead = f"behind at all {len(leads)} validations, at least by {leads[best]:.3f} (at {best:,.0f})"
        line = f"{row['label']}: a lower loss at equal updates is **{seen}**, {gap} at {row['equal_updates']['budget']:,.0f}; "
        line += lead
        if number == 4:
            instability = "seen" if row["rise"] > 2 * gluon["rise"] else "not seen"
            line += f"; a transient instability, a rise of twice Gluon's {gluon['rise']:.3f}, is {instability}"
        lines.append(line)
    return lines


def page_of(comparison: Comparison, number: int, scale: str, speed: Mapping[str, Any] | None) -> str:
    """A figure's section of results/README.md."""
    return body(comparison, speed, f"figures/figure{number}_{scale}.png", signs(number, comparison, speed))


def extra_options(words: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as a dictionary."""
    options, i = {}, 0
    while i < len(words):
        if not words[i].startswith("--"):
            raise UserError(f"{words[i]!r} belongs to no option; after -- write options of train_gpt.py as --key value")
        name, equals, value = words[i][2:].partition("=")
        if not equals:
            i += 1
            if i == len(words):
                raise UserError(f"--{name} needs a value")
            value = words[i]
        if name.replace("-", "_") in OWN:
            raise UserError(f"--{name} can't follow --; this command sets it for each run")
        options[name.replace("-", "_")] = value
        i += 1
    return options


def main(argv: list[str]) -> None:
    """Plan; print, or run; draw."""
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = study_parser("figures", __doc__)
    parser.add_argument("--figure", type=int, choices=tuple(FIGURES), required=True)
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--seeds", type=positive, help="number of seeds, from 0 on (default: full 1, mini 5, matched 3)")
    parser.add_argument("--steps", type=positive, help="updates (default: the config's; else 1000, mini figure 4: 3000)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run only these arms")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and how long it takes")
    parser.add_argument("--plot-only", action="store_true", help="draw what is there")
    arguments = parser.parse_args(own)
    scale, folders = arguments.scale, Folders(arguments.runs, arguments.results)
    seeds = arguments.seeds or {"full": 1, "mini": 5, "matched": 3}[scale]
    comparison = plan(arguments.figure, scale, seeds, arguments.steps, folders, extra_options(extra))
    if wrong := set(arguments.only or ()) - {arm.key for arm in comparison.arms}:
        raise UserError(f"no arm {min(wrong)}; the arms are {', '.join(arm.key for arm in comparison.arms)}")
    batch = FIGURES[arguments.figure].batch[scale]
    speed = read_speed(folders.calibration, batch, comparison.arms) if scale != "full" else None
    if arguments.dry_run:
        print(dry_run(comparison, scale, speed))
        return
    if not arguments.plot_only:
        if scale == "full":
            print(dry_run(comparison, scale, None))
            _need_gpu()
        jobs = [job for job in comparison.jobs() if not arguments.only or job.folder.parent.name in arguments.only]
        run_all(jobs, arguments.jobs if scale != "full" else 1)
    if not comparison.curves(comparison.baseline):
        raise UserError(f"no run of figure {arguments.figure}'s baseline is done yet; leave out --plot-only and --only")
    out = arguments.results / "figures" / f"figure{arguments.figure}_{scale}"
    print(write(comparison, speed, out, signs(arguments.figure, comparison, speed)))
    replace_section(
        arguments.results / "README.md",
        f"{scale} figure {arguments.figure}",
        page_of(comparison, arguments.figure, scale, speed),
    )


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UserError("the full size needs a GPU; --scale mini runs on a CPU, --dry-run says how long the full size takes")


if __name__ == "__main__":
    with one_line_errors("experiments.figures", interrupted=CONTINUES):
        main(sys.argv[1:])
