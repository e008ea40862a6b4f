"""One optimizer step on the matrices of a GPT: ours, torch's and other libraries', in turns, and the products alone.

    python benchmarks/optimizers.py                    small GPTs on the CPU, GPT-124M too where there is CUDA
    python benchmarks/optimizers.py --sets gpt-124m --only "Gluon,torch Muon"

The others are no requirements: pip install pytorch_optimizer heavyball; emerging-optimizers (Python 3.12). What is missing is
named on the page. Every contestant starts a step with its own copy of the same gradients, runs one after the other in each
round, and all ratios are medians of the rounds' ratios. Five iterations everywhere.
"""

import argparse
import importlib.metadata
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import (
    RESULTS,
    Clock,
    describe,
    goals_table,
    in_rounds,
    machine,
    milliseconds,
    peak_bytes,
    ratio,
    spread,
    table,
    tensor_bytes,
    write,
)
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3
from optim.polar import work_dtype

# (layers, width) and the most rounds of each set.
SETS = {"tiny": (1, 32, 3), "quickstart": (4, 128, 60), "gpt-6x384": (6, 384, 15), "gpt-124m": (12, 768, 40)}
FLOOR = "batched products alone"
OURS = {"Gluon": Gluon, "MVR-1": GluonMVR1, "MVR-2": GluonMVR2, "MVR-3": GluonMVR3}
LR = 1e-4


@dataclass
class Contestant:
    """`make` builds the optimizer of some parameters; `package` is what has to be installed."""

    name: str
    package: str
    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    two_passes: bool = False


def _pytorch_optimizer(name: str, **options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        import pytorch_optimizer

        if name == "SCION":
            from pytorch_optimizer.optimizer.scion import LMONorm

            options["norm_type"] = LMONorm.SPECTRAL
        groups = [{"params": params, "use_muon": True}] if name == "Muon" else params
        return getattr(pytorch_optimizer, name)(groups, lr=LR, **options)

    return make


def _heavyball(params: list[Tensor]) -> torch.optim.Optimizer:
    import heavyball

    return heavyball.Muon(params, lr=LR)


def _emerging(params: list[Tensor]) -> torch.optim.Optimizer:
    from emerging_optimizers.orthogonalized_optimizers import Muon

    return Muon(params, lr=LR)


CONTESTANTS = [
    *(Contestant(name, "", lambda p, cls=cls: cls(p, lr=LR), name in ("MVR-2", "MVR-3")) for name, cls in OURS.items()),
    Contestant("torch Muon", "torch", lambda p: torch.optim.Muon(p, lr=LR)),
    Contestant("pytorch-optimizer Muon", "pytorch_optimizer", _pytorch_optimizer("Muon")),
    Contestant("pytorch-optimizer SCION", "pytorch_optimizer", _pytorch_optimizer("SCION")),
    Contestant("pytorch-optimizer MARS (shampoo)", "pytorch_optimizer", _pytorch_optimizer("MARS", mars_type="shampoo")),
    Contestant("heavyball Muon", "heavyball", _heavyball),
    Contestant("emerging-optimizers Muon", "emerging-optimizers", _emerging),
]


def matrices(layers: int, width: int) -> list[torch.Size]:
    """The shapes of the hidden matrices of a GPT of this size."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=1, n_layer=layers, n_head=1, d_model=width, seq_len=1))
    return [p.shape for p in model.blocks.parameters()]


class Entry:
    """A contestant on its own copy of the tensors."""

    def __init__(self, contestant: Contestant, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        self.params = [torch.nn.Parameter(w.clone()) for w in weights]
        self.gradients, self.two_passes = gradients, contestant.two_passes
        self.optimizer = contestant.make(self.params)
        self.clock = Clock(weights[0].device)

    def _closure(self) -> Tensor:
        with self.clock.paused(), torch.no_grad():
            for p, g in zip(self.params, self.gradients, strict=True):
                if p.grad is None:
                    p.grad = g.clone()
                else:
                    p.grad.add_(g)
        return torch.zeros(())

    def prepare(self) -> None:
        for p, g in zip(self.params, self.gradients, strict=True):
            p.grad = None if self.two_passes else g.clone()

    def step(self) -> None:
        if self.two_passes:
            self.optimizer.step(self._closure)
        else:
            self.optimizer.step()

    def seconds(self) -> float:
        self.prepare()
        return self.clock.time(self.step)[0]

    def memory(self) -> tuple[float, float]:
        """(state, most held within a step beyond weights, gradients and state), in units of all the parameters."""
        size = sum(p.numel() * p.element_size() for p in self.params)
        self.prepare()
        peak = peak_bytes(self.step, self.params[0].device) - (size if self.two_passes else 0)
        return tensor_bytes(dict(self.optimizer.state)) / size, max(0, peak) / size


class Products:
    """The products of five iterations on stacks of one shape up to transposition, into buffers that stay."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.clock = Clock(weights[0].device)
        stacks = Counter(tuple(sorted(w.shape)) for w in weights)
        self._buffers = []
        for (m, k), n in stacks.items():
            x = torch.randn(n, m, k, device=weights[0].device)
            x = (x / torch.linalg.matrix_norm(x)[:, None, None]).to(work_dtype(weights[0], "polar_express"))
            self._buffers.append((x, x.new_empty(n, m, m), x.new_empty(n, m, m), torch.empty_like(x)))
        self.flops = sum(5 * n * (4 * m * m * k + 2 * m**3) for (m, k), n in stacks.items())

    def _run(self) -> None:
        for x, gram, square, out in self._buffers:
            for _ in range(5):
                torch.bmm(x, x.mT, out=gram)
                torch.bmm(gram, gram, out=square)
                torch.bmm(square, x, out=out)

    def seconds(self) -> float:
        return self.clock.time(self._run)[0]


class CountOperations(TorchDispatchMode):
    """Counts what computes: no views, no allocation. A `_foreach` operation is one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view"):
            self.counts[name] += 1
        return result


def count_operations(contestant: Contestant, shapes: Sequence[torch.Size]) -> Counter[str] | None:
    """The operations of a step (not the first) on tensors without data; None where that does not work."""
    weights = [torch.zeros(s, device="meta") for s in shapes]
    try:
        entry = Entry(contestant, weights, [torch.zeros_like(w) for w in weights])
        entry.prepare()
        entry.step()
        entry.prepare()
        with CountOperations() as counter:
            entry.step()
    except Exception:
        return None
    counts = counter.counts
    if entry.two_passes:  # the closure's own
        counts -= Counter({"clone": len(shapes) * (2 if contestant.name == "MVR-3" else 1), "zeros": 2})
        if contestant.name == "MVR-2":
            counts -= Counter({"add_": len(shapes)})
    return counts


def run_set(name: str, device: torch.device, chosen: Sequence[Contestant], rounds: int, budget: float) -> dict[str, Any]:
    """Every contestant on one set of matrices."""
    layers, width, most = SETS[name]
    generator = torch.Generator().manual_seed(0)
    shapes = matrices(layers, width)
    weights = [torch.randn(s, generator=generator).mul_(0.02).to(device) for s in shapes]
    gradients = [torch.randn(s, generator=generator).mul_(0.01).to(device) for s in shapes]
    entries: dict[str, Entry] = {}
    missing: dict[str, str] = {}
    for contestant in chosen:
        try:
            entry = Entry(contestant, weights, gradients)
            for _ in range(2):
                seconds = entry.seconds()
                if seconds > 30:  # a compiler's time comes once, a slow step's does not change
                    break
            entries[contestant.name] = entry
            print(f"  {contestant.name}: {seconds * 1e3:.4g} ms after warm-up", flush=True)
        except Exception as error:
            missing[contestant.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            print(f"  {contestant.name}: left out, {missing[contestant.name]}", flush=True)
    products = Products(weights)
    products.seconds()
    racers = {name: entry.seconds for name, entry in entries.items()} | {FLOOR: products.seconds}
    times = in_rounds(racers, min(rounds, most), budget)
    reference = times["Gluon"]
    found = {}
    for contestant, seconds in times.items():
        found[contestant] = spread(seconds) | {
            "over_gluon": ratio(seconds, reference), "over_floor": ratio(seconds, times[FLOOR]), "seconds": seconds,
        }  # fmt: skip
        if contestant in entries and found[contestant]["median"] < 10:
            found[contestant]["state"], found[contestant]["peak"] = entries[contestant].memory()
    return {
        "layers": layers, "width": width, "matrices": len(shapes), "parameters": sum(s.numel() for s in shapes),
        "rounds": len(reference), "flops": products.flops, "contestants": found, "missing": missing,
        "goals": goals(name, device, found),
    }  # fmt: skip


def goals(name: str, device: torch.device, found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """The goals that this set decides."""
    cuda = device.type == "cuda"
    result = [{"goal": "Gluon / batched products", "measured": found["Gluon"]["over_floor"], "sign": "≤", "bound": 1.5}]
    if "MVR-1" in found:
        result.append({"goal": "MVR-1 / Gluon", "measured": found["MVR-1"]["over_gluon"], "sign": "≤", "bound": 1.05})
    if "torch Muon" in found:
        bound = 5 if cuda else 20
        result.append(
            {"goal": "torch Muon / Gluon", "measured": found["torch Muon"]["over_gluon"], "sign": "≥", "bound": bound}
        )
    if cuda and name == "gpt-124m":
        result.append({"goal": "Gluon, ms", "measured": found["Gluon"]["median"] * 1e3, "sign": "≤", "bound": 4})
    memory = {n: found[n]["state"] + found[n]["peak"] for n in OURS if n in found}
    if len(memory) > 1:
        extra = max(memory.values()) - memory["Gluon"]
        result.append(
            {"goal": "parameter-sized buffers of a variant beyond Gluon's", "measured": extra, "sign": "≤", "bound": 0.5}
        )
    return result


def set_page(name: str, result: dict[str, Any], versions: dict[str, str]) -> str:
    rows = []
    for contestant, found in sorted(result["contestants"].items(), key=lambda item: item[1]["median"]):
        memory = [f"{found[k]:.2f}" if k in found else "" for k in ("state", "peak")]
        package = next((c.package for c in CONTESTANTS if c.name == contestant), "")
        label = f"{contestant} {versions[package]}" if versions.get(package) else contestant
        rows.append([label, *milliseconds(found), f"{found['over_gluon']:.3g}", f"{found['over_floor']:.3g}", *memory])
    head = ["", "ms, median", "quartiles", "× Gluon", "× products", "state", "more in the step"]
    left_out = "".join(f"\nLeft out: {n} ({why})." for n, why in result["missing"].items())
    return (
        f"## {name}: {result['matrices']} matrices, {result['layers']} layers of d = {result['width']}, "
        f"{result['parameters'] / 1e6:.3g}M parameters\n\n"
        f"{result['rounds']} rounds; the products are {result['flops'] / 1e9:.4g} GFLOP, "
        f"{result['flops'] / result['contestants'][FLOOR]['median'] / 1e9:.4g} GFLOP/s as measured.\n\n"
        f"{table(head, rows)}\n{left_out}\n\n{goals_table(result['goals'])}\n"
    )


def launches_page(shapes: Sequence[torch.Size]) -> tuple[str, dict[str, dict[str, int]]]:
    """The operations of a step of GPT-124M, counted without a device."""
    counted = {}
    for contestant in CONTESTANTS:
        if not contestant.package or contestant.package in ("torch", "pytorch_optimizer"):
            counts = count_operations(contestant, shapes)
            if counts is not None:
                counted[contestant.name] = dict(counts.most_common())
    rows = []
    for name, counts in counted.items():
        products = sum(v for k, v in counts.items() if "mm" in k)
        rows.append(
            [name, str(sum(counts.values())), str(products), ", ".join(f"{v} {k}" for k, v in list(counts.items())[:5])]
        )
    return table(["GPT-124M's 72 matrices", "operations a step", "products", "most frequent"], rows), counted


INTRO = """\
# An optimizer step on the matrices of a GPT

Written by `python benchmarks/optimizers.py`. {machine}

All contestants get copies of the same weights and gradients and take turns in every round; × is the median of the rounds'
ratios. Five iterations each: ours multiply in float32 on a CPU and in bfloat16 on CUDA, torch's Muon in bfloat16 everywhere.
MVR-2 and MVR-3 are measured without the two closures, which copy gradients. `state` and `more in the step` (beyond weights,
gradients and state) are in units of all the parameters. `batched products`: those of the five iterations and nothing else,
into buffers that stay.
"""

LAUNCHES = """\
## Operations, bytes and FLOPs of GPT-124M's step, counted

{table}

Operations are those that compute, as the dispatcher sees them (tensors without data, stacked as on CUDA); views and
allocations are left out, a `_foreach` operation counts once and is one launch per few dozen tensors, or one per tensor where
layouts or dtypes differ. An `out=` baddbmm is two kernels (it copies its first operand and then multiplies onto it).

The products of the five iterations are {tflop:.3g} TFLOP: {floor:.2g} ms at 790 TFLOP/s. Beside them, the copies of baddbmm
move {copies:.2g} GB in bfloat16, and the momentum, the stack, its two norms and the weights {rest:.2g} GB: {bandwidth:.2g} ms
at 4.8 TB/s. An estimate, not a measurement. (Adding a·I to the polynomial's diagonal would spare the larger copy; in bfloat16
it took the relative error of the Newton-Schulz factor from 1.1% to 2.0%, and on a CPU it gained nothing: not done.)
"""


def launches_text(shapes: Sequence[torch.Size]) -> tuple[str, dict[str, Any]]:
    counted_table, counted = launches_page(shapes)
    elements = sum(s.numel() for s in shapes)
    grams = sum(min(s) ** 2 for s in shapes)
    flops = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)
    copies = 5 * 2 * 2 * (grams + elements)
    # float32: gradient, momentum twice; momentum to bfloat16; two norms and two divisions; direction and weights twice.
    rest = elements * (12 + 6 + 2 * 2 + 2 * 4 + 2 + 8)
    text = LAUNCHES.format(
        table=counted_table, tflop=flops / 1e12, floor=flops / 790e12 * 1e3, copies=copies / 1e9, rest=rest / 1e9,
        bandwidth=(copies + rest) / 4.8e12 * 1e3,
    )  # fmt: skip
    return text, {"operations": counted, "flops": flops, "copied_bytes": copies, "other_bytes": rest}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sets", default="", help="comma-separated: " + ", ".join(SETS))
    parser.add_argument("--only", default="", help="comma-separated names of contestants (Gluon always runs)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1000, help="at most so many")
    parser.add_argument("--budget", type=float, default=150, help="seconds of rounds per set, three rounds at least")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="", help="of the page; default: optimizers_cpu or optimizers_cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny set, ours and torch's: does the script run?")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    device = torch.device(args.device)
    names = args.sets.split(",") if args.sets else ["quickstart", "gpt-6x384", *(["gpt-124m"] if device.type == "cuda" else [])]
    only = {"Gluon", *args.only.split(",")} if args.only else {c.name for c in CONTESTANTS}
    if args.quick:
        names, only = ["tiny"], {*OURS, "torch Muon"}
    if unknown := [*(set(names) - SETS.keys()), *(only - {c.name for c in CONTESTANTS})]:
        parser.error(f"unknown: {', '.join(unknown)}")
    host = machine(device)
    results = {}
    for name in names:
        print(name, flush=True)
        results[name] = run_set(name, device, [c for c in CONTESTANTS if c.name in only], args.rounds, args.budget)
    host["load_at_end"] = round(os.getloadavg()[0], 2)
    versions = {c.package: _version(c.package) for c in CONTESTANTS if c.package}
    launches, counted = launches_text(matrices(*SETS["tiny" if args.quick else "gpt-124m"][:2]))
    pages = [set_page(name, result, versions) for name, result in results.items()]
    page = "\n".join([INTRO.format(machine=describe(host)), *pages, launches])
    data = {"machine": host, "versions": versions, "sets": results, "gpt_124m_counted": counted}
    path = write(args.out, args.name or f"optimizers_{device.type}", page, data)
    print(page)
    print(f"written to {path}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
