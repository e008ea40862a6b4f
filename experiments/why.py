"""Why does γ = 1 train badly? Training without noise, training near the noise scale, and the noise along a run.

    python -m experiments.why --jobs 2       run what is missing, and write the page; about an hour of one core a seed
    python -m experiments.why --plot-only    the page and the picture again, from the packed records

The model is that of configs/mini_gluon.py, with a constant lr. A seed sets the initial weights and the order of the text.

`exact`    the same 128 sequences at every step: 120 updates on the exact gradients of one function
`double`   the same in float64 with 64 sequences, 40 updates: MVR-1 with γ = 1 against Gluon without momentum
`near`     64 sequences a step, which is near the gradient's noise scale: 300 updates
`along`    the noise of the gradient and of g - ĝ along such runs of Gluon (experiments.noise)
"""

import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, one_line_errors, positive
from common.files import write_text
from common.machine import cpu_name
from common.pictures import COLOURS, INK, LOOK, pyplot
from common.tables import markdown
from experiments.comparison import CONFIG, Arm, study_parser
from experiments.figures import Folders
from experiments.intervals import Interval, interval, paired
from experiments.noise import along, exact, summary, total
from experiments.run_jobs import CONTINUES, ROOT, Job, processes, run_all, words_of
from reading.runs import Run, read_packed, write_packed
from training.config import Config, load_config

TITLE = "Why γ = 1 trains badly"
LRS = (2.5e-4, 6.25e-5)
EXACT_STEPS, DOUBLE_STEPS, NEAR_STEPS = 120, 40, 300
EXACT_BATCH, DOUBLE_BATCH, NEAR_BATCH = 128, 64, 64
MEASURED_AT = (50, 100, 200, 300, 400, 599)
POOL, PART = 64, 8  # the pool of `along`: its batches, and the sequences of one
PREDICTED = (8, NEAR_BATCH, 512)  # batch sizes of γ*


def _arm(key: str, label: str, optimizer: str, momentum: float, **options: float) -> Arm:
    return Arm(key, label, {"optimizer": optimizer, "momentum": momentum, **options})


_ARMS = (
    _arm("gluon_beta0.9", "Gluon, β 0.9", "gluon", 0.9),
    _arm("gluon_beta0.5", "Gluon, β 0.5", "gluon", 0.5),
    _arm("gluon_beta0", "Gluon, β 0: no momentum", "gluon", 0.0),
    _arm("mvr1_beta0.9", "MVR-1, γ 1, β 0.9", "mvr1", 0.9, gamma=1.0),
    _arm("mvr1_beta0.5", "MVR-1, γ 1, β 0.5", "mvr1", 0.5, gamma=1.0),
    _arm("mvr3_beta0.2", "MVR-3, γ 1, β 0.2, q 0.5", "mvr3", 0.2, q=0.5, gamma=1.0),
    _arm("transported", "transported Scion, β 0.9", "experiments.contestants:Transported", 0.9),
    _arm("mvr2_q0.2", "MVR-2, β 0.9, q 0.2", "mvr2", 0.9, q=0.2),
    _arm("mvr2_q0.5", "MVR-2, β 0.9, q 0.5", "mvr2", 0.9, q=0.5),
    _arm("mvr2_q0.8", "MVR-2, β 0.9, q 0.8", "mvr2", 0.9, q=0.8),
)
ARMS = {arm.key: arm for arm in _ARMS}
CHANGE = r"\|D\|/\|G\|"
KEPT, DROPPED = "gluon_beta0.9", "gluon_beta0"  # the two runs between which every method lies
EXACT = (KEPT, "gluon_beta0.5", DROPPED, "mvr1_beta0.9")
DRAWN = {KEPT: "-", "mvr2_q0.5": "--", DROPPED: "-", "mvr1_beta0.9": "--"}

Runs = dict[int, list[dict[str, Any]]]  # lines of metrics by seed


# What was measured ----------------------------------------------------------------------------------------------------


def read(results: Path) -> dict[str, dict[tuple[str, float], Runs]]:
    """The packed runs: part, then (arm, lr), then seed."""
    found: dict[str, dict[tuple[str, float], Runs]] = {"exact": {}, "double": {}, "near": {}, "along": {}}
    for part, runs in found.items():
        for path in sorted((results / "why" / part).glob("*.jsonl")):
            for run in read_packed(path).values():
                runs.setdefault((path.stem, run.config["lr"]), {})[run.config["seed"]] = run.metrics
    return found


def values(runs: Runs, name: str, since: int, until: int | None = None) -> dict[int, float]:
    """By seed: the mean of a column over the updates from `since` to `until` (default: of update `since` alone)."""
    until = since if until is None else until
    found = {}
    for seed, lines in runs.items():
        held = [line[name] for line in lines if name in line and since <= line["update"] <= until]
        if held:
            found[seed] = statistics.fmean(held)
    return found


def share(runs: Mapping[tuple[str, float], Runs], arm: str, lr: float, name: str, at: int) -> float:
    """Where an arm's loss lies between that of Gluon with its momentum (0) and without (1): the mean over the seeds of all."""
    loss, kept, dropped = (values(runs.get((key, lr), {}), name, at) for key in (arm, KEPT, DROPPED))
    seeds = loss.keys() & kept.keys() & dropped.keys()
    above, whole = (sum(x[seed] - kept[seed] for seed in seeds) for x in (loss, dropped))
    return above / whole if seeds else float("nan")


def rows_of(runs: Mapping[tuple[str, float], Runs], lr: float, name: str, at: int) -> list[dict[str, Any]]:
    """For each arm that has runs: its loss after `at` updates, and its differences from Gluon with and without momentum."""
    kept, dropped = (values(runs.get((key, lr), {}), name, at) for key in (KEPT, DROPPED))
    rows = []
    for key, arm in ARMS.items():
        loss = values(runs.get((key, lr), {}), name, at)
        if loss:
            bases = ((base, held) for base, held in ((KEPT, kept), (DROPPED, dropped)) if loss.keys() & held.keys())
            gaps = {base: paired(loss, held) for base, held in bases}
            row = {"key": key, "arm": arm, "loss": interval([*loss.values()]), "share": share(runs, key, lr, name, at)}
            rows.append(row | {"gaps": gaps})
    return rows


def noise_at(runs: Runs, update: int, kind: str | None = None) -> dict[str, Interval]:
    """The quantities of `experiments.noise.summary` at an update, over the seeds. `kind`: of one kind of matrix alone."""
    found: dict[str, list[float]] = {}
    for lines in runs.values():
        for line in lines:
            if line["update"] == update:
                moment = line["moments"][kind] if kind else total(line["moments"])
                for name, value in summary(moment, PART, PREDICTED).items():
                    found.setdefault(name, []).append(value)
    return {name: interval(held) for name, held in found.items()}


def largest_gap(runs: Mapping[tuple[str, float], Runs]) -> float:
    """The largest difference of the losses of MVR-1 with γ = 1 and Gluon without momentum, over all updates, lrs and seeds."""
    gaps = []
    for (key, lr), found in runs.items():
        if key == DROPPED:
            for seed, lines in found.items():
                other = runs["mvr1_beta0.9", lr][seed]
                gaps += [abs(a["train_loss"] - b["train_loss"]) for a, b in zip(lines, other, strict=True)]
    return max(gaps)


# The page -------------------------------------------------------------------------------------------------------------

HEAD = """\
Made by `python -m experiments.why` (`--plot-only` makes it again from the packed runs beside it).
The model is the byte model of `configs/mini_gluon.py` (0.2 M parameters, sequences of 128 bytes)
at a constant lr. Brackets are 95% intervals (Student's t); differences are paired by seed, and
below zero is better. *Share* is where the mean loss lies between Gluon with β = 0.9 (0) and Gluon
without momentum (1).
"""

REASON = """\
**With γ = 1 the momentum has no memory.** MVR-1 with γ = 1 is M_k = g_k + β (M_{k-1} - ĝ_k).
Without noise ĝ_k is the last gradient, and so was M_{k-1}. So M_k = g_k for any β: Gluon without
momentum. The same holds for MVR-3 with γ = 1, while MVR-2 is Gluon with its momentum. This is what
γ = 1 is for: it takes away the lag of the average.

**But an LMO needs the average.** Its step has a fixed length, however short the gradient is. In a
steep direction the weights jump over the bottom of the valley, the gradient turns round, and the
next step jumps back. An average of old gradients cancels the two jumps and keeps the slope along
the valley. The present gradient, however exact, does not.

**The noise comes on top.** The noise of g - ĝ enters each step undamped and lasts 1/(1-β) steps.
Where a share is above 1, that noise costs more than the rest of the average saves.
"""

EXACT_TEXT = """\
The same 128 sequences at every step, so each gradient is exact. The loss is that of these
sequences after 120 updates. The cosine is that of successive gradients, and \\|D\\|/\\|G\\| the
length of their difference over that of the first; both are means over updates 60 to 120. MVR-2 is
Gluon here, bit for bit.
"""
IDENTITY = "In float64, on 64 sequences, the losses of MVR-1 with γ = 1 and of Gluon without momentum"
ROUNDING = "In float32, rounding drives them apart, as it does any two runs whose weights bounce."

NEAR_TEXT = """\
64 sequences a step. The loss is that of the validation text after 300 updates. Transported Scion
(`experiments.contestants`, [arXiv 2605.18528](https://arxiv.org/abs/2605.18528)) takes the lag
away too, with one gradient at X_k + β/(1-β) (X_k - X_{k-1}). For a quadratic without noise it is
Gluon without momentum as well, but here it keeps most of what the average gives. Its point lies
nine steps ahead, which may be too far for the loss to look quadratic.
"""

ALONG_TEXT = """\
Along Gluon with β = 0.9 and 64 sequences a step, on 512 sequences that the run does not train on.
The noise scale is tr Σ / \\|G\\|²: a batch of so many sequences has as much noise as gradient. S
is the noise of g - ĝ and σ that of g. D is the true change of the gradient in one update. γ\\* =
\\|D\\|² / E\\|D_B\\|² is the γ for which γ (g - ĝ) estimates D best on batches of B sequences
(Shulgin, Gadaev, Khirirat, Richtárik, "Understanding MARS: When Scaling Momentum Correction
Provably Helps", ICML 2026). The noise of these estimates themselves is taken out of \\|G\\|,
\\|D\\| and the cosine.
"""
MARS_TEXT = (
    r"**γ\* says how well g - ĝ is estimated, and no more.** With 64 sequences it is close to 1, so γ = 1 should be nearly the "
    "best scale."
)
MARS_SEEN = "The estimate is good. What it estimates, the present gradient, is the wrong direction for a step of fixed length."

PREDICTION = """\
GPT-124M has not been run. What this page says about it was written down before anyone did:

- MVR-1 with γ = 1 and β = 0.9 trains nearer to Gluon without momentum than to Gluon with β =
  0.9: at 1,500 updates of B = 512 its validation loss is past the middle of the two, on every
  seed.
- Gluon with β = 0.9 is at that loss before update 1,000.
- MVR-2 with q = 0.5 is within a tenth of that gap of Gluon with β = 0.9.

Others' runs on a similar model and the same batch say how much is at stake: spectral steps without
momentum needed
[8,225 updates](https://github.com/KellerJordan/modded-nanogpt/pull/326), tuned Muon
[3,250](https://github.com/KellerJordan/modded-nanogpt/pull/340), to the same loss. The test, about
3 hours of one H100 by estimate:

```bash
python -m data.fineweb --shards 8
for arm in "gluon 0.9" "gluon 0.0" "mvr1 0.9" "mvr2 0.9"; do
    set -- $arm
    python train_gpt.py --config configs/gluon_b512.py --optimizer $1 --momentum $2 \\
        --steps 1500 --run-name why_$1_$2
done
python -m scripts.compare runs/why_*
```

The defaults of `mvr1` and `mvr2` are γ = 1 and q = 0.5. If MVR-1 is at the loss of Gluon with
β = 0.9, this page is wrong about GPT-124M.
"""


def page(found: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    parts = [f"# {TITLE}", "", HEAD, "![MVR-1 with γ = 1 trains like Gluon without momentum](why.png)", "", REASON]
    parts += ["## Without noise", "", _without_noise(found["exact"], found["double"])]
    parts += ["## Near the noise scale", "", _near(found["near"])]
    parts += ["## The noise along a run of Gluon", "", _along(found["along"], found["near"])]
    return "\n".join([*parts, "## What it predicts for GPT-124M", "", PREDICTION])


def _without_noise(runs: Mapping[tuple[str, float], Runs], double: Mapping[tuple[str, float], Runs]) -> str:
    half, text = EXACT_STEPS // 2, [EXACT_TEXT]
    for lr in LRS:
        if rows := rows_of(runs, lr, "train_loss", EXACT_STEPS):
            table = [["method", "seeds", "loss", "minus Gluon, β 0.9", "minus Gluon, β 0", "share", "cosine", CHANGE]]
            for row in rows:
                held = [values(runs[row["key"], lr], name, half, EXACT_STEPS) for name in ("cosine", "change")]
                table.append([*_cells(row), *(_number(interval([*found.values()])) for found in held)])
            text += [f"lr {lr:g}:\n", markdown(table)]
    if double:
        gap = f"{largest_gap(double):.0e} over {DOUBLE_STEPS} updates"
        text.append(_paragraph(f"{IDENTITY} differ by at most {gap} (both lrs): they are one method. {ROUNDING}"))
    return "\n".join(text)


def _near(runs: Mapping[tuple[str, float], Runs]) -> str:
    text = [NEAR_TEXT]
    for lr in LRS:
        if rows := rows_of(runs, lr, "val_loss", NEAR_STEPS):
            table = [["method", "seeds", "loss", "minus Gluon, β 0.9", "minus Gluon, β 0", "share"], *map(_cells, rows)]
            text += [f"lr {lr:g}:\n", markdown(table)]
    return "\n".join(text)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The cells that the first two tables have in common."""
    gaps = [
        row["gaps"][base].judged if base in row["gaps"] and row["key"] not in (base, KEPT) else "" for base in (KEPT, DROPPED)
    ]
    return [row["arm"].label, f"{row['loss'].n}", row["loss"].level, *gaps, f"{row['share']:.2f}"]


def _along(runs: Mapping[tuple[str, float], Runs], near: Mapping[tuple[str, float], Runs]) -> str:
    columns = {
        "noise_scale": "noise scale (sequences)", "noise_ratio": "S/σ", "change": CHANGE, "cosine": "cosine",
        **{f"gamma_{batch}": f"γ* at {batch}" for batch in PREDICTED},
    }  # fmt: skip
    text = [ALONG_TEXT]
    for lr in LRS:
        if of_lr := runs.get((KEPT, lr), {}):
            table = [["update", *columns.values()]]
            for update in sorted(set.intersection(*({line["update"] for line in lines} for lines in of_lr.values()))):
                found = noise_at(of_lr, update)
                table.append([f"{update}", *(_number(found[name]) for name in columns)])
            text += [f"lr {lr:g}, {len(of_lr)} seed{'s' * (len(of_lr) > 1)}:\n", markdown(table)]
    of_lr = runs[KEPT, LRS[0]]
    end = next(iter(of_lr.values()))[-1]
    table = [["kind of matrix", *columns.values()]]
    for kind in end["moments"]:
        found = noise_at(of_lr, end["update"], kind)
        table.append([kind, *(_number(found[name]) for name in columns)])
    text += [f"By kind of matrix, lr {LRS[0]:g}, update {end['update']}:\n", markdown(table)]
    return "\n".join([*text, _paragraph(_verdict(runs, near))])


def _verdict(along: Mapping[tuple[str, float], Runs], near: Mapping[tuple[str, float], Runs]) -> str:
    """What γ* predicts, and what was seen."""
    seen = []
    for lr in LRS:
        noise = noise_at(along.get((KEPT, lr), {}), NEAR_STEPS)
        rows = {row["key"]: row for row in rows_of(near, lr, "val_loss", NEAR_STEPS)}
        if noise and "mvr1_beta0.9" in rows:
            gap, best = rows["mvr1_beta0.9"]["gaps"][KEPT].mean, noise[f"gamma_{NEAR_BATCH}"].mean
            seen.append(f"at lr {lr:g} γ\\* is {best:.2f}, and γ = 1 is {gap:.3f} behind γ = 0")
    return f"{MARS_TEXT} Seen, with β = 0.9: {'; '.join(seen)}. {MARS_SEEN}"


def _number(found: Interval) -> str:
    """A mean with three digits, and its interval. (That of two seeds is far too wide to say anything.)"""
    return f"{found.mean:.3g}" + (f" [{found.low:.3g}, {found.high:.3g}]" if found.n > 2 else "")


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 96, break_long_words=False, break_on_hyphens=False) + "\n"


def draw(found: Mapping[str, Any], out: Path) -> None:
    """The losses of Gluon with and without momentum, of MVR-2 and of MVR-1, without noise and near the noise scale."""
    plt, lr = pyplot(), LRS[0]
    colours = {KEPT: INK, "mvr2_q0.5": COLOURS[0], DROPPED: COLOURS[4], "mvr1_beta0.9": COLOURS[1]}
    sides = (("exact", "train_loss", "No noise at all: the exact gradient of 128 sequences", EXACT_STEPS),
             ("near", "val_loss", f"{NEAR_BATCH} sequences a step, near the noise scale", NEAR_STEPS))  # fmt: skip
    with plt.rc_context(LOOK):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for panel, (part, name, title, end) in zip(panels, sides, strict=True):
            for key, style in DRAWN.items():
                runs = found[part].get((key, lr), {})
                if not runs:
                    continue
                updates = sorted({line["update"] for lines in runs.values() for line in lines if name in line})
                updates = [u for u in updates if end // 6 <= u <= end]
                means = [statistics.fmean(values(runs, name, u).values()) for u in updates]
                panel.plot(updates, means, style, color=colours[key], lw=2.2, label=ARMS[key].label)
            panel.set(xlabel="Updates", yscale="log")
            panel.set_title(title, fontsize=11, loc="left")
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            panel.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
            panel.tick_params(axis="y", which="minor", labelsize=9)
        panels[0].set_ylabel("Loss (nats a byte)")
        panels[1].legend(frameon=False)
        figure.suptitle("MVR-1 with γ = 1 trains like Gluon without momentum", fontsize=13)
        figure.savefig(out, dpi=130)
        plt.close(figure)


# The runs -------------------------------------------------------------------------------------------------------------


def near_job(folders: Folders, arm: str, lr: float, seed: int) -> Job:
    """A run of train_gpt.py."""
    options = {
        **ARMS[arm].options, "lr": lr, "batch_size": NEAR_BATCH, "micro_batch_size": 16, "steps": NEAR_STEPS, "seed": seed,
        "val_every": 25, "log_every": 25, "checkpoint_every": 100, "keep_checkpoints": 1,
    }  # fmt: skip
    place = Path("why") / "near"
    return Job(folders.runs / place / arm / name_of(lr, seed), folders.results / place / f"{arm}.jsonl", CONFIG, options)


def name_of(lr: float, seed: int) -> str:
    return f"lr{lr:g}_seed{seed}"


def config_of(part: str, arm: str, lr: float, seed: int) -> Config:
    """The options of a run that train_gpt.py does not make: those of the other three parts."""
    special = {
        "exact": {"steps": EXACT_STEPS, "batch_size": EXACT_BATCH},
        "double": {"steps": DOUBLE_STEPS, "batch_size": DOUBLE_BATCH, "dtype": "float64"},
        "along": {"steps": MEASURED_AT[-1] + 1, "batch_size": NEAR_BATCH},
    }
    common = {"lr": lr, "micro_batch_size": 16, "seed": seed, "run_name": name_of(lr, seed)}
    options = {**ARMS[arm].options, **common, **special[part]}
    return load_config([f"--config={ROOT / CONFIG}", *words_of(options)])


def measure(folders: Folders, seeds: int, at_once: int) -> None:
    """Make the missing runs of the three other parts, seed by seed, in processes of their own, and pack each when it ends."""
    waiting: list[tuple[Path, Config]] = []
    for seed in range(seeds):
        for part, arms in (("exact", EXACT), ("double", (DROPPED, "mvr1_beta0.9")), ("along", (KEPT,))):
            for arm in arms:
                path = folders.results / "why" / part / f"{arm}.jsonl"
                done = read_packed(path) if path.exists() else {}
                waiting += [(path, config_of(part, arm, lr, seed)) for lr in LRS if name_of(lr, seed) not in done]
    print(f"{len(waiting)} runs to measure", flush=True)
    with processes(at_once) as pool:
        started = {pool.submit(*_measurement(path.parent.name, config)): (path, config) for path, config in waiting}
        for future in as_completed(started):
            path, config = started[future]
            run = Run(config.run_name, path, config.to_dict(), _environment(), future.result())
            path.parent.mkdir(parents=True, exist_ok=True)
            write_packed(path, [*({**(read_packed(path) if path.exists() else {}), run.name: run}).values()])
            print(f"  {path.parent.name}/{path.stem} {run.name}   {run.metrics[-1]['train_loss']:.4f}", flush=True)


def _measurement(part: str, config: Config) -> tuple[Any, ...]:
    """The function of experiments.noise that makes a run, and its arguments."""
    if part == "along":
        return along, config, MEASURED_AT, POOL, PART
    return exact, config, 1 if part == "double" else 5


def _environment() -> dict[str, Any]:
    """What a packed run says about its machine and its code."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "platform": platform.platform(), "device": cpu_name(),
        "cores": os.cpu_count(), "threads": 1, "python": platform.python_version(), "torch": torch.__version__, "cuda": None,
        "revision": revision,
    }  # fmt: skip


def main(argv: list[str]) -> None:
    """Run what is missing, then write the page and the picture."""
    parser = study_parser("why", __doc__)
    parser.add_argument("--seeds", type=positive, default=3, help="number of seeds, from 0 on [3]")
    parser.add_argument("--plot-only", action="store_true", help="write the page and the picture from what is there")
    arguments = parser.parse_args(argv)
    folders = Folders(arguments.runs, arguments.results)
    if not arguments.plot_only:
        measure(folders, arguments.seeds, arguments.jobs)
        run_all([near_job(folders, arm, lr, s) for s in range(arguments.seeds) for lr in LRS for arm in ARMS], arguments.jobs)
    found = read(folders.results)
    if not all(found[part].get((KEPT, LRS[0])) for part in ("exact", "near", "along")):
        raise UserError("the runs of Gluon are not done yet; leave out --plot-only")
    out = folders.results / "why"
    draw(found, out / "why.png")
    write_text(out / "README.md", page(found))
    print(page(found))


if __name__ == "__main__":
    with one_line_errors("experiments.why", interrupted=CONTINUES):
        main(sys.argv[1:])
