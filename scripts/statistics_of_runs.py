"""What the evidence is computed with, apart from any run: intervals, pairs, equal budgets, costs, the sweep's trials.

Pure functions of numbers, without torch; `tests/test_evidence.py` holds them to values known from elsewhere.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# One and two gradients an update; `nested` is MVR-2 with `inner`.
TWO_GRADIENTS = ("mvr2", "mvr3", "nested")
TOKENS_PER_SHARD = 100_000_000
PEAK_FLOPS = 989e12  # dense bfloat16, H100 and H200 SXM


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
        """What the interval says of a difference of losses, variant minus baseline."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "undecided"

    @property
    def level(self) -> str:
        """As a loss, where `str` gives a difference."""
        if not math.isfinite(self.mean):
            return "diverged"
        return f"{self.mean:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.n > 1 else "")

    def __str__(self) -> str:
        if self.n < 2:
            return f"{self.mean:+.3f} (one seed)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def student_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's distribution with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
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
    """The interval of variant minus baseline over the seeds that both have."""
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        raise ValueError("no seed that both have")
    return interval([variant[seed] - baseline[seed] for seed in seeds])


# Equal budgets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The validations of one run: the updates in order, and the loss at each."""

    updates: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, update: float) -> float:
        """The loss at an update, by the straight line between the validations beside it."""
        if not self.updates[0] <= update <= self.updates[-1] + 1e-9:
            raise ValueError(f"update {update:g} is outside the validations {self.updates[0]} to {self.updates[-1]}")
        for i, right in enumerate(self.updates):
            if update <= right + 1e-9:
                left = self.updates[max(i - 1, 0)]
                share = (update - left) / (right - left) if right > left else 1.0
                if share >= 1:
                    return self.losses[i]
                return (1 - share) * self.losses[i - 1] + share * self.losses[i]
        raise AssertionError


def gradient_evaluations(method: str, updates: float) -> float:
    """What updates cost in gradients of a batch. MVR-2 has nothing to compare its first gradient with; MVR-3 evaluates its
    last batch again."""
    if method not in TWO_GRADIENTS or updates <= 0:
        return max(updates, 0)
    return 2 * updates if method == "mvr3" else max(2 * updates - 1, updates)


def updates_for(method: str, evaluations: float) -> float:
    """The updates that so many gradient evaluations pay for: the inverse of `gradient_evaluations`."""
    if method not in TWO_GRADIENTS:
        return evaluations
    return evaluations / 2 if method == "mvr3" else min((evaluations + 1) / 2, evaluations)


@dataclass(frozen=True)
class Speed:
    """Calibrated seconds: of one gradient, and of a method's update beside its gradients."""

    gradient: float
    update: Mapping[str, float]

    def seconds(self, method: str, updates: float) -> float:
        return gradient_evaluations(method, updates) * self.gradient + updates * self.update[method]

    def updates_for(self, method: str, seconds: float) -> float:
        """The updates that fit into so many seconds."""
        low, high = 0.0, 1.0
        while self.seconds(method, high) < seconds:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.seconds(method, middle) < seconds else (low, middle)
        return high


def equal_updates(variant: Curve, baseline: Curve) -> tuple[float, float, float]:
    """(updates, variant's loss, baseline's) where the shorter of the two ends."""
    end = min(variant.updates[-1], baseline.updates[-1])
    return end, variant.at(end), baseline.at(end)


def equal_evaluations(method: str, variant: Curve, baseline: Curve) -> tuple[float, float, float]:
    """(evaluations, variant's loss, baseline's) at the most gradient evaluations that both curves reach.

    The baseline takes one gradient an update. Reading a curve before its end is fair where the lr is constant: the run
    does not know how long it will be."""
    budget = min(gradient_evaluations(method, variant.updates[-1]), baseline.updates[-1])
    return budget, variant.at(updates_for(method, budget)), baseline.at(budget)


def equal_seconds(method: str, variant: Curve, baseline: Curve, speed: Speed) -> tuple[float, float, float]:
    """(seconds, variant's loss, baseline's) at the most calibrated seconds that both curves reach."""
    budget = min(speed.seconds(method, variant.updates[-1]), speed.seconds("gluon", baseline.updates[-1]))
    read = [
        curve.at(min(speed.updates_for(name, budget), curve.updates[-1]))
        for name, curve in ((method, variant), ("gluon", baseline))
    ]
    return budget, read[0], read[1]


def largest_rise(losses: Sequence[float]) -> float:
    """How far a curve climbs above the lowest loss it had before: 0 where it only falls."""
    lowest, rise = math.inf, 0.0
    for loss in losses:
        if not math.isfinite(loss):
            return math.inf
        rise, lowest = max(rise, loss - lowest), min(lowest, loss)
    return rise


# A page ---------------------------------------------------------------------------------------------------------------


def replace_section(text: str, name: str, body: str) -> str:
    """The text with what stands between `<!-- name -->` and `<!-- end of name -->` replaced; unchanged where they are not."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        return text
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{body.strip()}\n{end}{rest.partition(end)[2]}"


# What a run costs -----------------------------------------------------------------------------------------------------


def flops_per_token(vocab_size: int, n_layer: int, d_model: int, seq_len: int) -> int:
    """Forward and backward of the GPT: 6 per parameter and 12·L·D·T for attention, as `GPT.flops_per_token`."""
    return 6 * (vocab_size * d_model + 12 * n_layer * d_model**2) + 12 * n_layer * d_model * seq_len


@dataclass(frozen=True)
class Cost:
    """A run on paper."""

    updates: int
    tokens: int
    shards: int
    evaluations: int
    flops: float

    def seconds(self, devices: int, mfu: float = 0.4) -> float:
        """On H100 or H200 at this share of their peak."""
        return self.flops / (devices * PEAK_FLOPS * mfu)


def cost(
    method: str, updates: int, batch_size: int, seq_len: int, flops: int, validations: int = 0, val_tokens: int = 0
) -> Cost:
    """Tokens, shards, gradients and FLOP of a run; `flops` per token of a gradient, a validation costs a third of it."""
    tokens = updates * batch_size * seq_len
    evaluations = round(gradient_evaluations(method, updates))
    total = flops * (evaluations * batch_size * seq_len + validations * val_tokens / 3)
    return Cost(updates, tokens, math.ceil((tokens + 1) / TOKENS_PER_SHARD), evaluations, total)


# The sweep ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A setting: lr, momentum β, the correction's γ (MVR-1, -2, -3) and q (nested)."""

    lr: float
    momentum: float = 0.9
    gamma: float = 0.1
    q: float = 0.5

    def options(self, method: str) -> dict[str, float]:
        """As options of train_gpt.py; those that a method does not have are left out."""
        options = {"lr": self.lr, "momentum": self.momentum}
        if method in ("mvr1", "mvr2", "mvr3"):
            options["gamma"] = self.gamma
        return options | ({"inner": self.q} if method == "nested" else {})


def first_stage(lrs: Sequence[float]) -> list[Trial]:
    """The grid: every lr, at the defaults of the rest."""
    return [Trial(lr) for lr in lrs]


def strata(generator: random.Random, count: int) -> list[float]:
    """A column of a Latin hypercube: [0, 1) cut into `count` strata, a draw in each, in a random order."""
    values = [(i + generator.random()) / count for i in range(count)]
    generator.shuffle(values)
    return values


def second_stage(best: float, seed: int, count: int) -> list[Trial]:
    """A Latin hypercube around the best lr of the first stage: the same draws for every method.

    lr within a factor √2, log-uniform; β a permutation of (0.8, 0.9, 0.95), repeated; γ log-uniform in [0.02, 0.5]; q
    uniform in [0.2, 0.9]. Each range is cut into `count` strata, one draw in each."""
    generator = random.Random(seed)

    betas = [(0.8, 0.9, 0.95)[i % 3] for i in range(count)]
    generator.shuffle(betas)
    return [
        Trial(
            lr=float(f"{best * 2 ** (u - 0.5):.3g}"),
            momentum=beta,
            gamma=float(f"{0.02 * 25**v:.3g}"),
            q=float(f"{0.2 + 0.7 * w:.3g}"),
        )
        for u, beta, v, w in zip(
            strata(generator, count), betas, strata(generator, count), strata(generator, count), strict=True
        )
    ]


def less_momentum(best: Trial, factor: float) -> list[Trial]:
    """The best so far with 1 - β multiplied, the other knobs as they are."""
    return [replace(best, momentum=round(1 - factor * (1 - best.momentum), 6))]
