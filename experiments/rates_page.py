"""The statistics of experiments/rates.py (described there), its tables and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.pictures import pyplot
from common.tables import markdown
from experiments.rates_recursion import METHODS, PAPERS, bound

# Statistics -----------------------------------------------------------------------------------------------------------


def slope(log_k: np.ndarray, log_y: np.ndarray) -> np.ndarray:
    """Least-squares slope along the last axis."""
    x = log_k - log_k.mean()
    return (log_y * x).sum(-1) / (x * x).sum()


def interval(samples: np.ndarray) -> list[float]:
    """The central 95% of the samples."""
    return [float(v) for v in np.quantile(samples, (0.025, 0.975))]


def fit(horizons: Sequence[int], values: np.ndarray, resamples: int = 10_000) -> dict[str, np.ndarray]:
    """Slopes of the mean over seeds of `values` (methods, horizons, seeds), all K and upper half, with bootstraps.

    The same resampled seeds serve all methods and horizons, so differences between methods are paired.
    """
    log_k = np.log(np.asarray(horizons, dtype=float))
    half = slice(len(horizons) // 2, None)
    n = values.shape[-1]
    weight = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    log_mean = np.log(values.mean(-1))
    log_boot = np.log(np.einsum("mks,rs->rmk", values, weight))
    return {
        "slope": slope(log_k, log_mean),
        "slope_boot": slope(log_k, log_boot),
        "upper": slope(log_k[half], log_mean[:, half]),
        "upper_boot": slope(log_k[half], log_boot[..., half]),
        "log_boot": log_boot,
    }


def analyse(horizons: Sequence[int], results: dict) -> None:
    """Add slopes, intervals, differences and ratios to `results`, in place."""
    names = [m.name for m in METHODS]
    gluon = names.index("Gluon")
    log_k = np.log(np.array(horizons, dtype=float))
    half = len(horizons) // 2
    for record in results.values():
        f = fit(horizons, np.array([record["values"][name] for name in names]))
        log_boot = f["log_boot"]
        log_mean = np.log([np.mean(record["values"][name], axis=-1) for name in names])
        record["fits"], record["minus_gluon"], record["over_gluon"] = {}, {}, {}
        for i, method in enumerate(METHODS):
            rate = [bound(method, K, record["radius"]) for K in horizons]
            log_bound = None if rate[0] is None else np.log(rate)
            record["fits"][method.name] = {
                "slope": float(f["slope"][i]),
                "slope_95": interval(f["slope_boot"][:, i]),
                "upper_half": float(f["upper"][i]),
                "upper_half_95": interval(f["upper_boot"][:, i]),
                "bound": None if log_bound is None else float(slope(log_k, log_bound)),
                "bound_upper_half": None if log_bound is None else float(slope(log_k[half:], log_bound[half:])),
                "local_slopes": (np.diff(log_mean[i]) / np.diff(log_k)).tolist(),
                "last": float(np.exp(log_mean[i, -1])),
                "last_95": interval(np.exp(log_boot[:, i, -1])),
            }
        for name in PAPERS:
            mvr = names.index(name)
            difference = {
                "slope": (f["slope"][mvr] - f["slope"][gluon], f["slope_boot"][:, mvr] - f["slope_boot"][:, gluon]),
                "upper_half": (f["upper"][mvr] - f["upper"][gluon], f["upper_boot"][:, mvr] - f["upper_boot"][:, gluon]),
            }
            record["minus_gluon"][name] = {k: {"value": float(v), "ci95": interval(s)} for k, (v, s) in difference.items()}
            record["over_gluon"][name] = {
                "equal_updates": [
                    {"K": K, "ratio": float(np.exp(log_mean[mvr, j] - log_mean[gluon, j])),
                     "ci95": interval(np.exp(log_boot[:, mvr, j] - log_boot[:, gluon, j]))}
                    for j, K in enumerate(horizons)
                ],
                "equal_gradients": [
                    {"gradients": K, "ratio": float(np.exp(log_mean[mvr, j - 1] - log_mean[gluon, j])),
                     "ci95": interval(np.exp(log_boot[:, mvr, j - 1] - log_boot[:, gluon, j]))}
                    for j, K in enumerate(horizons) if j
                ],
            }  # fmt: skip


# The page -------------------------------------------------------------------------------------------------------------


def summary(report: dict) -> str:
    """Analyse the report in place. Returns its table."""
    analyse(report["horizons"], report["results"])
    return table(report)


def show(value: float, ci95: Sequence[float], digits: int = 3) -> str:
    """`value [low, high]`."""
    return f"{value:.{digits}f} [{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]"


def table(report: dict) -> str:
    """The report as Markdown."""
    horizons = report["horizons"]
    low, mid, high = (round(math.log2(horizons[i])) for i in (0, len(horizons) // 2, -1))
    top = report["tuning_horizons"][-1]
    out = [
        "# Rates: slopes of the error against the horizon K",
        "",
        f"Made by `{report['command']}`: {len(report['seeds'])} seeds, K = 2^{low} … 2^{high}, "
        f"{report['wall_seconds']:.0f} s on one thread of {report['machine']['cpu']}, "
        f"torch {report['machine']['torch']}. Brackets are 95% bootstrap intervals over seeds. c_α, c_t: the constants "
        f'tuned at K = {report["tuning_horizons"][-1]} on {len(report["tuning_seeds"])} other seeds; "at end": the best '
        f"value was an end of the grid (in the star-convex problems c_t = 0.5 and c_α = 1 on MVR's schedules are the least "
        f"that the theory allows). Envelope: slope of the best constants for each K apart. Near-best: the slopes of "
        f"the pairs within 25% of the best error at that K (and how many they are).",
    ]
    for name, record in report["results"].items():
        out += [
            "",
            f"## `{name}`: {record['title']}",
            "",
        ]
        rows = [
            [
                "method",
                "bound",
                "measured slope",
                f"its upper half, K ≥ 2^{mid}",
                f"error at 2^{high}",
                "c_α, c_t",
                f"envelope, K ≤ {top}",
                f"near-best constants, K ≤ {top}",
            ]
        ]
        for m in METHODS:
            f, tuning = record["fits"][m.name], record["tuning"][m.name]
            ends = ", ".join({"c_alpha": "c_α"}.get(end, end) for end in tuning["on_edge_of_grid"])
            ends = f" ({ends} at end)" if ends else ""
            near = tuning["near_best_slopes"]
            exponent = "–" if f["bound"] is None else f"{f['bound']:.3f}"
            if f["bound"] is not None and record["radius"]:
                exponent = ("-1/2" if m.passes == 2 else "-1/3") + f"; with log {exponent}"
            rows.append(
                [
                    m.name,
                    exponent,
                    show(f["slope"], f["slope_95"]),
                    show(f["upper_half"], f["upper_half_95"]),
                    f"{f['last']:.3g}",
                    f"{tuning['c_alpha']:g}, {tuning['c_t']:g}{ends}",
                    f"{tuning['envelope_slope']:.3f}",
                    f"{near[0]:.2f} … {near[1]:.2f} ({tuning['near_best']})",
                ]
            )
        out.append(markdown(rows))
        rows = [
            [
                "minus Gluon",
                "slope",
                "upper half",
                f"error over Gluon's, 2^{high} updates each",
                f"2^{high} gradients each",
                "by horizon, equal gradients",
            ]
        ]
        for method, d in record["minus_gluon"].items():
            updates, gradients = (record["over_gluon"][method][key] for key in ("equal_updates", "equal_gradients"))
            rows.append(
                [method, show(**d["slope"]), show(**d["upper_half"])]
                + [show(ends[-1]["ratio"], ends[-1]["ci95"]) for ends in (updates, gradients)]
                + [", ".join(f"{g['ratio']:.2f}" for g in gradients)]
            )
        out.append(markdown(rows).rstrip())
    return "\n".join(out) + "\n"


def picture(report: dict, path: Path) -> None:
    """Errors above (95% bands, the bounds dashed), local slopes below."""
    plt = pyplot()

    # Okabe and Ito's colours, a marker of its own for each method
    style = dict(zip([m.name for m in METHODS], [("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "v"),
                                                 ("#CC79A7", "D"), ("#E69F00", "x"), ("#56B4E9", "*"), ("#999999", "+")],
                     strict=True))  # fmt: skip
    horizons = np.array(report["horizons"], dtype=float)
    middle = np.sqrt(horizons[1:] * horizons[:-1])
    columns = len(report["results"])
    fig, axes = plt.subplots(2, columns, figsize=(4.7 * columns, 8.4), height_ratios=(3, 2), squeeze=False)
    for column, record in enumerate(report["results"].values()):
        above, below = axes[:, column]
        f = fit(report["horizons"], np.array([record["values"][m.name] for m in METHODS]), resamples=2000)
        for i, m in enumerate(METHODS):
            colour, marker = style[m.name]
            mean = np.array(record["values"][m.name]).mean(-1)
            low, high = np.quantile(np.exp(f["log_boot"][:, i]), (0.025, 0.975), axis=0)
            line = record["fits"][m.name]
            main = m.name == "Gluon" or m.name in PAPERS
            label = f"{m.name}: {line['slope']:.2f}"
            above.plot(horizons, mean, color=colour, marker=marker, ms=5, lw=1.8 if main else 1, label=label)
            above.fill_between(horizons, low, high, color=colour, alpha=0.2, lw=0)
            below.plot(middle, line["local_slopes"], color=colour, marker=marker, ms=4, lw=1.8 if main else 0.8)
            if line["bound"] is not None:
                rate = np.array([bound(m, K, record["radius"]) for K in horizons])
                above.plot(horizons, rate * mean[-1] / rate[-1] * 1.15, color=colour, ls=":", lw=1.2)
                local = np.diff(np.log(rate)) / np.diff(np.log(horizons))
                below.plot(middle, local, color=colour, ls=":", lw=1.2)
        above.set(xscale="log", yscale="log", title=record["title"])
        above.set_xscale("log", base=2)
        above.legend(fontsize=8, title="slope over all K (dotted: bound's rate)", title_fontsize=8)
        below.set_xscale("log", base=2)
        below.set(xlabel="horizon K (updates)", ylim=(-1.3, 0.25))
        below.axhline(0, color="#999999", lw=0.6)
        for ax in (above, below):
            ax.grid(alpha=0.25, which="both", lw=0.4)
    axes[0, 0].set_ylabel("error (mean over seeds, 95% band)")
    axes[1, 0].set_ylabel("local slope between neighbouring K")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
