"""How fast do Gluon and its momentum-variance-reduced variants converge? The theory's rates, measured on matrix problems.

    python -m experiments.rates            # 6 to 8 minutes on one thread; writes results/rates/
    python -m experiments.rates --quick    # seconds; writes results/rates-quick/
    python -m experiments.rates --replot   # the table and the picture again, from results/rates/rates.json

Qian, Rammal, Kovalev and Richtárik, "Muon is Provably Faster with Momentum Variance Reduction" (abstract, theorem 1),
bound the mean dual norm of the gradient by O(K^-1/4) for Gluon and O(K^-1/3) for MVR in the non-convex case, and
f - f* by Õ(K^-1/3) for Muon and Õ(K^-1/2) for Muon-MVR in the star-convex case. This script runs every method at
horizons K = 2^6 ... 2^16, each with the step sizes that the theory prescribes *for that K*, and fits the slope of the
error against K on log-log axes. The methods, their schedules and the problems are in experiments/rates_recursion.py, the
statistics and the page in experiments/rates_page.py.

**Constants.** For each problem and method a grid of pairs (c_alpha, c_t), of the same size for every method, is run on 8
seeds that are used for nothing else. The pair with the smallest mean error at the single horizon K = 2^11, the middle of
the range, is kept for all K. Slopes play no part in the choice. The grids keep alpha < 1 at every K and, in the star-convex
problems, c_t >= 1/2 and alpha >= b as the theory demands. In the non-convex ones t is at most a quarter of ||X_0 - W||:
larger steps at small K throw X so far out that h' vanishes, and a small dual norm would look like success. A choice at an
end of the grid is marked.
The same runs give the *envelope*: the best pair of the grid for each K <= 2^11 separately, without a re-test. It shows
whether a gap in slope comes from the prescribed powers of K alone. The range of the slopes of all pairs whose error at
2^11 is within 25% of the best shows how much the slope depends on the constants.

**Statistics.** 16 seeds (the start and the noise; the noise is shared between the methods, independent between
horizons). Least-squares slope of log(mean over seeds) against log K; 95% percentile interval from 10,000 bootstrap
resamples of the seeds, joint over horizons and methods, so that differences are paired. The interval covers
only the scatter between seeds, not the curvature of the line or the choice of problem and constants. So the table also has
the slope of the upper half (K >= 2^11), and the picture has the local slopes. The mean dual norm is over all steps, or over
1024 evenly spaced ones if K is larger.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from common.errors import Parser, UserError, as_written, one_line_errors, positive
from common.files import write_text
from common.machine import cpu_name
from experiments.rates_page import picture, slope, summary
from experiments.rates_recursion import METHODS, PROBLEMS, Arm, N, Problem, arms_of, nuclear, simulate


def tune(problem: Problem, horizons: Sequence[int], seeds: Sequence[int]) -> dict:
    """Each method's best constants at the last of `horizons`, and the envelope: the best at each."""
    arms = [arm for method in METHODS for arm in arms_of(method, problem.radius)]
    error = simulate(problem, arms, horizons[::-1], seeds)[problem.metric].mean(-1).flip(0).numpy()
    log_k = np.log(np.array(horizons, dtype=float))
    chosen = {}
    for method in METHODS:
        mine = [i for i, arm in enumerate(arms) if arm.method is method]
        best = [min(mine, key=lambda i: row[i]) for row in error]
        grid = [arms[i] for i in mine]
        edges = {name: {min(getattr(a, name) for a in grid), max(getattr(a, name) for a in grid)}
                 for name in ("c_alpha", "c_t")}  # fmt: skip
        pick = arms[best[-1]]
        near = [i for i in mine if error[-1, i] <= 1.25 * error[-1, best[-1]]]
        near = slope(log_k, np.log(error[:, near]).T)
        envelope = np.array([row[i] for row, i in zip(error, best, strict=True)])
        chosen[method.name] = {
            "c_alpha": pick.c_alpha,
            "c_t": pick.c_t,
            "on_edge_of_grid": [name for name in edges if getattr(pick, name) in edges[name]],
            "envelope": envelope.tolist(),
            "envelope_constants": [(arms[i].c_alpha, arms[i].c_t) for i in best],
            "envelope_slope": float(slope(log_k, np.log(envelope))),
            "near_best": len(near),
            "near_best_slopes": [float(near.min()), float(near.max())],
        }
    return chosen


def noise_ratio(problem: Problem, seeds: Sequence[int]) -> dict[str, float]:
    """Mean dual norms at the start: of one gradient's noise, and of the exact gradient."""
    X = torch.stack([problem.initial(s) for s in seeds])
    draws = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 1000, len(seeds), N, N)))
    noise = nuclear(problem.grad(X, draws) - problem.grad(X)).mean().item()
    return {"noise": noise, "gradient_at_start": nuclear(problem.grad(X)).mean().item()}


def run(horizons: Sequence[int], seeds: Sequence[int], tune_to: int, tune_seeds: Sequence[int]) -> dict:
    """Tune every problem on its own seeds, then measure. Returns the results for rates.json."""
    assert not set(seeds) & set(tune_seeds)
    results = {}
    for problem in PROBLEMS:
        began = time.perf_counter()
        chosen = tune(problem, [K for K in horizons if tune_to >= K], tune_seeds)
        tuned = time.perf_counter()
        arms = [Arm(m, chosen[m.name]["c_alpha"], chosen[m.name]["c_t"]) for m in METHODS]
        values = simulate(problem, arms, horizons[::-1], seeds)[problem.metric].flip(0).permute(1, 0, 2)
        done = time.perf_counter()
        print(f"{problem.name}: tuning {tuned - began:.0f} s, runs {done - tuned:.0f} s", flush=True)
        results[problem.name] = {
            "title": problem.title,
            "metric": problem.metric,
            "sigma": problem.sigma,
            "radius": problem.radius,
            "scales": noise_ratio(problem, seeds),
            "tuning": chosen,
            "seconds": {"tuning": tuned - began, "runs": done - tuned},
            "values": {m.name: [[float(f"{v:.6g}") for v in row] for row in values[i].tolist()]
                       for i, m in enumerate(METHODS)},
        }  # fmt: skip
    return results


def machine() -> dict[str, str]:
    """The machine and the versions."""
    return {"cpu": cpu_name(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def main(argv: Sequence[str] | None = None) -> dict:
    """Run, or only draw again. Returns the report."""
    parser = Parser(description="measured convergence rates of Gluon and MVR", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="K = 2^4 … 2^9 and 8 seeds: a check, not a measurement")
    parser.add_argument("--replot", action="store_true", help="tables and picture again, from rates.json")
    parser.add_argument("--seeds", type=int, default=None, help="default 16 (quick: 8)")
    parser.add_argument("--max-exponent", type=int, default=None, help="largest K is 2 to this; default 16 (quick: 9)")
    parser.add_argument("--out", type=Path, default=None, help="default results/rates (quick: results/rates-quick)")
    parser.add_argument("--threads", type=positive, default=1)
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    first, last = (4, 9) if args.quick else (6, 16)
    last = last if args.max_exponent is None else args.max_exponent
    count = (8 if args.quick else 16) if args.seeds is None else args.seeds
    if last < first + 2:
        raise UserError(f"--max-exponent {last} leaves fewer than three horizons; give at least {first + 2}")
    if count < 2:
        raise UserError(f"--seeds {count} leaves no spread to measure; give at least 2")
    torch.set_num_threads(args.threads)
    out = args.out or Path("results") / ("rates-quick" if args.quick else "rates")
    out.mkdir(parents=True, exist_ok=True)

    if args.replot:
        with as_written(out / "rates.json", "run without --replot"):
            report = json.loads((out / "rates.json").read_text())
            text = summary(report)
    else:
        horizons = [2**e for e in range(first, last + 1)]
        seeds = list(range(count))
        tune_to = 2 ** ((first + last) // 2)
        tune_seeds = list(range(10_000, 10_004 if args.quick else 10_008))
        began = time.perf_counter()
        results = run(horizons, seeds, tune_to, tune_seeds)
        report = {
            "command": shlex.join(["python", "-m", "experiments.rates", *argv]),
            "machine": machine(),
            "threads": args.threads,
            "wall_seconds": time.perf_counter() - began,
            "horizons": horizons,
            "seeds": seeds,
            "tuning_seeds": tune_seeds,
            "tuning_horizons": [K for K in horizons if tune_to >= K],
            "results": results,
        }
        text = summary(report)
    write_text(out / "rates.json", json.dumps(report, ensure_ascii=False) + "\n")
    write_text(out / "table.md", text)
    picture(report, out / "rates.png")
    print(text)
    return report


if __name__ == "__main__":
    with one_line_errors("experiments.rates"):
        main()
