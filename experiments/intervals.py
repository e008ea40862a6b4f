"""The numbers of the studies: intervals, paired differences, curves at equal budgets.

Pure functions of numbers, without torch. `tests/experiments/test_intervals.py` checks them against values known from elsewhere.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# What a comparison can hold equal: fields of `Curve`, and their names in words.
BUDGETS = {"updates": "updates", "passes": "gradient evaluations", "seconds": "seconds"}


# Intervals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean of n values with its 95% interval (n = 1 has none: infinite ends)."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """What the interval says about a difference of losses, variant minus baseline."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "undecided"

    @property
    def judged(self) -> str:
        """A difference with its verdict, as Markdown."""
        return f"{self} **{self.verdict}**"

    @property
    def level(self) -> str:
        """The interval as text for a loss; `str` is for a difference."""
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.n > 1 else "")

    def __str__(self) -> str:
        if not math.isfinite(self.mean):
            return "diverged"
        if self.n < 2:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's distribution with `df` degrees of freedom, an integer (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan2(abs(t), math.sqrt(df))
    cosine, sine = math.cos(theta), math.sin(theta)
    if df % 2:
        term, total = cosine, cosine if df > 1 else 0.0
        for j in range(3, df - 1, 2):
            term *= cosine**2 * (j - 1) / j
            total += term
        area = 2 / math.pi * (theta + sine * total)
    else:
        term, total = 1.0, 1.0
        for j in range(2, df - 1, 2):
            term *= cosine**2 * (j - 1) / j
            total += term
        area = sine * total
    return 0.5 + math.copysign(area / 2, t)


def student_quantile(p: float, df: int) -> float:
    """The t with P(T <= t) = p, for p above one half."""
    low, high = 0.0, 1.0
    while student_cdf(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95% interval by Student's t. A value that is not finite (a run that diverged) makes the mean infinite."""
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    if not all(map(math.isfinite, values)):
        return Interval(math.inf, -math.inf, math.inf, n)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = student_quantile(0.975, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired(variant: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """The interval of variant minus baseline over the seeds that both have. Raises ValueError if there are none."""
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        raise ValueError("no seed that both have")
    return interval([variant[seed] - baseline[seed] for seed in seeds])


# Curves ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The validations of one run, in order: updates, the gradient evaluations and seconds that the weights took, the loss."""

    updates: tuple[float, ...]
    passes: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def end(self, budget: str) -> float:
        """How much of a budget (a key of `BUDGETS`) the full run took."""
        return getattr(self, budget)[-1]

    def at(self, budget: str, spent: float) -> float:
        """The loss when `spent` of a budget was used, interpolated between validations. Raises ValueError outside them.

        Reading a curve before its end is fair if the lr is constant, because the run then does not depend on its length.
        """
        spends = getattr(self, budget)
        if not spends[0] <= spent <= spends[-1] + 1e-9:
            raise ValueError(f"{spent:g} {budget} are outside the validations {spends[0]:g} to {spends[-1]:g}")
        i = bisect_right(spends, spent + 1e-9) - 1  # the last of several validations at one cost
        if i + 1 == len(spends) or spends[i] >= spent - 1e-9:
            return self.losses[i]
        share = (spent - spends[i]) / (spends[i + 1] - spends[i])
        return (1 - share) * self.losses[i] + share * self.losses[i + 1]

    def reached(self, loss: float) -> float:
        """The update at which the curve first reaches a loss, interpolated between validations; infinite if it never does."""
        for i, found in enumerate(self.losses):
            if found <= loss:
                if i == 0:
                    return self.updates[0]
                share = (self.losses[i - 1] - loss) / (self.losses[i - 1] - found)
                return self.updates[i - 1] + share * (self.updates[i] - self.updates[i - 1])
        return math.inf


def to_reach(update: int, passes: float) -> float:
    """The gradient evaluations needed to reach X_u. `passes`: those of a deferred run when it validated X_u.

    MVR-1, -2 and -3 apply update u inside step u, between its two evaluations. So a run that continues has evaluated 2u+1
    gradients when it can validate X_u. The two of step u serve X_{u+1}; X_u took 2u-1, as many as a run of u updates evaluates
    in all. Step 0 evaluates one gradient, and each of the next u steps (passes - 1) / u.
    """
    return passes - (passes - 1) / update if update else passes


def difference(
    variant: Mapping[int, Curve], baseline: Mapping[int, Curve], budget: str, most: float = math.inf
) -> tuple[float, Interval]:
    """(budget, variant minus baseline) over the seeds that both have, at the largest budget up to `most` that all reach."""
    seeds = variant.keys() & baseline.keys()
    spent = min([most, *(curves[seed].end(budget) for curves in (variant, baseline) for seed in seeds)])
    values = [{seed: curves[seed].at(budget, spent) for seed in seeds} for curves in (variant, baseline)]
    return spent, paired(*values)


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """The mean of curves that were validated at the same updates."""
    columns = [[*zip(*values, strict=True)] for values in zip(*(vars(curve).values() for curve in curves), strict=True)]
    return Curve(*(tuple(math.fsum(values) / len(values) for values in column) for column in columns))


def largest_rise(losses: Sequence[float]) -> float:
    """The most that a curve climbs above the lowest loss before; 0 if it only falls."""
    lowest, rise = math.inf, 0.0
    for loss in losses:
        if not math.isfinite(loss):
            return math.inf
        rise, lowest = max(rise, loss - lowest), min(lowest, loss)
    return rise
