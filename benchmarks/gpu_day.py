"""The first ten minutes on a GPU: is everything correct on it, and how fast is it?

    python -m benchmarks.gpu_day --out gpu_day --budget 560

The most useful sections run first, each in its own process with a deadline. `gpu_day.md` and `gpu_day.json` are rewritten after
each section; the table of passes and failures is printed at the end. The script makes its own data, and needs torch, numpy,
safetensors, filelock and tqdm. If compilation fails, the models run eagerly. `--device cpu --quick` runs every section at toy
size. The exit code is 0 if nothing failed.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import Parser, UserError, one_line_errors
from common.files import write_text
from common.tables import aligned, markdown
from data.shards import write_shard
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3, MuonMVR, PreviousBatchMVR, SingleBatchMVR
from optim.polar import polar
from training.metrics import peak_flops

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(tempfile.gettempdir()) / f"gpu_day_{os.getuid()}"  # fixed, so that sections and later runs share compiled code
TOY = GPTConfig(257, 2, 2, 32, 32)
VARIANTS: dict[str, Callable[..., Any]] = {
    "Gluon": Gluon, "MVR-1": GluonMVR1, "MVR-2": GluonMVR2, "MVR-3": GluonMVR3, "SingleBatchMVR": SingleBatchMVR,
    "PreviousBatchMVR": PreviousBatchMVR,
}  # fmt: skip
# Parts of the names of attention kernels, to find the one that SDPA chose.
ATTENTION = ("flash", "cudnn", "efficient", "fmha", "attention")


class Lab:
    """A section's argument: the device, the sizes, and methods that report its numbers and verdicts."""

    def __init__(self, device: str, quick: bool, answers: Connection) -> None:
        self.device, self.quick, self._answers = torch.device(device), quick, answers
        self.cuda = self.device.type == "cuda"
        self.config = TOY if quick else GPTConfig()

    def check(self, what: str, value: float, most: float) -> None:
        """Pass if value ≤ most; NaN fails."""
        self._answers.send(("check", what, float(value), most, bool(value <= most)))

    def note(self, what: str, value: Any) -> None:
        self._answers.send(("note", what, value))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def model(self) -> GPT:
        """A model without zero weights, so that every gradient is tested."""
        torch.manual_seed(0)
        model = GPT(self.config)
        for p in model.parameters():
            if not p.any():
                nn.init.uniform_(p, -(p.size(1) ** -0.5), p.size(1) ** -0.5)
        return model.to(self.device)

    def compiled(self, model: GPT) -> Any:
        """The compiled model after one run. If that fails, the model itself, and a note that says why."""
        net = torch.compile(model, dynamic=False, backend="aot_eager" if self.quick else "inductor")
        try:
            gradients(self, net, self.tokens(2 if self.quick else 32))
        except Exception as error:
            self.note("eager, because compilation failed", f"{type(error).__name__}: {str(error)[:400]}")
            return model
        return net

    def tokens(self, sequences: int) -> Tensor:
        shape = (sequences, self.config.seq_len + 1)
        return torch.randint(self.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def seconds(self, call: Callable[[], Any], repeats: int) -> float:
        """The median time of a call, after two calls to warm up."""
        times = []
        for _ in range(2 + repeats):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def gradients(lab: Lab, net: Any, tokens: Tensor) -> Tensor:
    """One pass: leaves the gradients in .grad. Returns the loss."""
    net.zero_grad(set_to_none=True)
    with lab.autocast():
        loss = net(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach()


def groups(model: GPT) -> list[dict[str, Any]]:
    return [
        {"params": list(model.blocks.parameters()), "norm": "spectral", "radius": 50.0},
        {"params": [model.embedding.weight], "norm": "sign", "radius": 3000.0},
    ]


def distance(a: Tensor, b: Tensor) -> float:
    """The relative distance of a from b; NaN if one has a NaN."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()


# The sections -----------------------------------------------------------------------------------------------------------


def environment(lab: Lab) -> None:
    """The machine, and its limits: the speed of a copy and of a matrix product."""
    lab.note("torch", torch.__version__)
    lab.note("threads", torch.get_num_threads())
    name = "cpu"
    if lab.cuda:
        card = torch.cuda.get_device_properties(lab.device)
        name = card.name
        lab.note("card", f"{name}, {card.total_memory / 2**30:.1f} GiB, {card.multi_processor_count} multiprocessors")
        lab.note("CUDA", torch.version.cuda)
        lab.note("cuDNN", torch.backends.cudnn.version())
    x = torch.ones(2**20 if lab.quick else 2**28, device=lab.device)
    y = torch.empty_like(x)
    lab.note("copy, GB/s", 2 * x.nbytes / lab.seconds(lambda: y.copy_(x), 5) / 1e9)
    n = 128 if lab.quick else 8192
    a = torch.randn(n, n, device=lab.device, dtype=torch.bfloat16)
    speed = 2 * n**3 / lab.seconds(lambda: a @ a, 10)
    lab.note(f"product of {n}³ in bfloat16, TFLOP/s", speed / 1e12)
    if peak := peak_flops(name):
        lab.check("data sheet's FLOP/s over the product's", peak / speed, 1.7)


class Toy(nn.Module):
    """A few matrices under a loss that is not quadratic, in float64."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def forward(self, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + k)
        total = torch.zeros((), dtype=torch.float64, device=self.weights[0].device)
        for w in self.weights:
            x = torch.randn(w.size(1), 5, generator=generator, dtype=torch.float64).to(w.device)
            total = total + (w @ x).tanh().square().mean() + (w @ x).sin().mean()
        return total


def walk(name: str, net: Toy, steps: int, polar_method: str) -> list[Tensor]:
    """The weights after some steps of an optimizer and a flush."""
    *matrices, last, plain = net.weights
    if name == "MuonMVR":
        optimizer: Any = MuonMVR(net.parameters(), lr=0.02, is_approx=True, polar=polar_method)
    else:
        params = [
            {"params": matrices, "radius": 2.0, "weight_decay": 0.1},
            {"params": [last], "norm": "sign"},
            {"params": [plain], "norm": "adamw"},
        ]
        optimizer = VARIANTS[name](params, lr=0.02, momentum=0.8, polar=polar_method)

    for k in range(steps):

        def closure(k: int = k) -> Tensor:
            loss = net(k)
            loss.backward()
            return loss

        optimizer.step(closure)
    if name != "MuonMVR":
        optimizer.flush()
    return [w.detach().cpu() for w in net.weights]


def optimizers(lab: Lab) -> None:
    """Every optimizer in float64 with exact polar factors, on the device and on the CPU."""
    shapes = [(12, 8), (8, 12), (10, 10), (12, 8), (9, 6), (7, 5)]
    for name in [*VARIANTS, "MuonMVR"]:
        here = walk(name, Toy(*shapes).to(lab.device), 6, "svd")
        there = walk(name, Toy(*shapes), 6, "svd")
        lab.check(f"{name}: distance from the CPU", max(map(distance, here, there)), 1e-9)


def polar_factor(lab: Lab) -> None:
    """The factor in the device's working precision against the same polynomials in float64, for the model's shapes."""
    d = lab.config.d_model
    for rows, columns in ((d, d), (4 * d, d), (d, 4 * d)):
        generator = torch.Generator().manual_seed(2)
        u, v = (torch.linalg.qr(torch.randn(n, d, generator=generator).to(lab.device))[0] for n in (rows, columns))
        m = (u * torch.logspace(0, -1.3, d, device=lab.device)) @ v.T
        factor = polar(torch.stack([m, torch.zeros_like(m)]))
        shape = f"{rows} × {columns}"
        lab.check(f"{shape}: distance from float64", distance(factor[0], polar(m.double())), 2e-2)
        values = torch.linalg.svdvals(factor[0].float())
        lab.check(f"{shape}: 0.7 / smallest singular value", 0.7 / values.min().item(), 1.0)
        lab.check(f"{shape}: largest singular value", values.max().item(), 1.25)
        lab.check(f"{shape}: the factor of zero", factor[1].abs().max().item(), 0.0)
        for scale in (1e-30, 1e30):
            lab.check(f"{shape}: distance at scale {scale:g}", distance(polar(m * scale), factor[0]), 2e-2)


def ranks(lab: Lab) -> None:
    """Two gloo ranks on one device, with a parameter of 4 MB, against one process."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = []
        processes = []
        for rank in range(2):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=one_rank, args=(lab.device, lab.quick, rank, f"{folder}/store", theirs), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for _ in VARIANTS:
            for rank, pipe in enumerate(pipes):
                name, error = pipe.recv()  # EOFError if the rank died, which has printed why
                lab.check(f"{name}, rank {rank}: distance from one process", error, 1e-9)
        for process in processes:
            process.join()


def one_rank(device: torch.device, quick: bool, rank: int, store: str, answers: Connection) -> None:
    torch.set_num_threads(1)
    shapes = [(1024, 512), (16, 8), (8, 16), (6, 6), (33, 7), (5, 3)]  # float64: the first has 4 MB
    if quick:
        shapes[0] = (64, 32)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shared = {name: walk(name, Toy(*shapes).to(device), 3, "polar_express") for name in VARIANTS}
    dist.barrier()
    dist.destroy_process_group()
    for name, there in shared.items():
        alone = walk(name, Toy(*shapes).to(device), 3, "polar_express")
        answers.send((name, max(map(distance, there, alone))))


def compilation(lab: Lab) -> None:
    """The compiled model against the eager one, from the same weights; and is any graph compiled twice?"""
    sequences = 2 if lab.quick else 32
    model, tokens = lab.model(), lab.tokens(sequences)
    eager = gradients(lab, model, tokens)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    start = time.perf_counter()
    net = lab.compiled(model)
    lab.note("seconds to compile", time.perf_counter() - start)
    lab.check("compilation failed", float(net is model), 0.0)
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    for _ in range(3):
        loss = gradients(lab, net, tokens)
    lab.check("loss: relative distance from eager", abs(loss - eager).item() / abs(eager).item(), 2e-3)
    worst = max(distance(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)
    lab.check("gradients: relative distance from eager", worst, 3e-2)
    lab.check("graphs compiled again", counts["unique_graphs"] - before, 0)
    lab.note("graph breaks", sum(torch._dynamo.utils.counters["graph_break"].values()))


def throughput(lab: Lab) -> None:
    """Forward and backward: tokens/s, MFU, peak memory."""
    model = lab.model()
    net = lab.compiled(model)
    peak = peak_flops(torch.cuda.get_device_name(lab.device)) if lab.cuda else 0.0
    for sequences in (2,) if lab.quick else (32, 64):
        tokens = lab.tokens(sequences)
        if lab.cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = sequences * lab.config.seq_len / lab.seconds(lambda t=tokens: gradients(lab, net, t), 3 if lab.quick else 10)
        lab.note(f"{sequences} sequences: tokens/s", speed)
        if peak:
            lab.note(f"{sequences} sequences: MFU, %", 100 * speed * model.flops_per_token(lab.config.seq_len) / peak)
        if lab.cuda:
            lab.note(f"{sequences} sequences: peak memory, GiB", torch.cuda.max_memory_allocated() / 2**30)


def steps(lab: Lab) -> None:
    """Full steps of one micro-batch, in turns: how much time each optimizer adds to the passes. All move the same model."""
    model = lab.model()
    net, tokens = lab.compiled(model), lab.tokens(2 if lab.quick else 32)
    built: dict[str, Any] = {name: VARIANTS[name](groups(model), lr=1e-6) for name in ("Gluon", "MVR-1", "MVR-2", "MVR-3")}
    built["AdamW rule"] = Gluon([{"params": list(model.parameters()), "norm": "adamw"}], lr=1e-6)
    built["torch.optim.AdamW"] = torch.optim.AdamW(model.parameters(), lr=1e-6)
    matrices = Gluon(groups(model)[:1], lr=1e-6)
    passes = {name: getattr(optimizer, "passes", 1) for name, optimizer in built.items()}

    def closure() -> Tensor:
        return gradients(lab, net, tokens)

    def matrices_alone() -> None:
        for p in model.blocks.parameters():
            p.grad = torch.ones_like(p)
        matrices.step()

    times: dict[str, list[float]] = {name: [] for name in built}
    alone = lab.seconds(closure, 3 if lab.quick else 10)
    for _ in range(3 if lab.quick else 10):
        for name, optimizer in built.items():
            times[name].append(lab.seconds(lambda o=optimizer: o.step(closure), 1))
    whole = {name: statistics.median(values) for name, values in times.items()}
    lab.note("one pass, ms", 1e3 * alone)
    peak = peak_flops(torch.cuda.get_device_name(lab.device)) if lab.cuda else 0.0
    flops = tokens[:, 1:].numel() * model.flops_per_token(lab.config.seq_len)
    for name, seconds in whole.items():
        mfu = f", MFU {100 * passes[name] * flops / seconds / peak:.1f}%" if peak else ""
        rest = 1e3 * (seconds - passes[name] * alone)
        lab.note(f"{name}: step", f"{1e3 * seconds:.2f} ms, {rest:.2f} ms without its passes{mfu}")
    fill = lab.seconds(lambda: [torch.ones_like(p) for p in model.blocks.parameters()], 3)
    own = 1e3 * (lab.seconds(matrices_alone, 3 if lab.quick else 10) - fill)
    lab.note("Gluon on the blocks' matrices, ms", own)
    if lab.cuda:
        lab.check("Gluon on the blocks' matrices, ms", own, 4.0)
        for name in ("MVR-1", "MVR-2", "MVR-3"):
            lab.check(f"{name}'s step over Gluon's", whole[name] / whole["Gluon"], 2.05)


def kernels(lab: Lab) -> None:
    """Does a step ever wait for the device, and where does its time go?"""
    model = lab.model()
    net, tokens = lab.compiled(model), lab.tokens(2 if lab.quick else 32)
    for name, variant in VARIANTS.items():
        optimizer = variant(groups(model), lr=1e-6)
        for _ in range(2):  # the first steps differ
            optimizer.step(lambda: gradients(lab, net, tokens))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if lab.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                optimizer.step(lambda: gradients(lab, net, tokens))
            finally:
                if lab.cuda:
                    torch.cuda.set_sync_debug_mode("default")
        where = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
        lab.check(f"{name}: waits for the device in a step", len(where), 0)
        if where:
            lab.note(f"{name}: waits at", ", ".join(sorted(set(where))))
    optimizer = Gluon(groups(model), lr=1e-6)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if lab.cuda else [])]) as profile:
        optimizer.step(lambda: gradients(lab, net, tokens))
        lab.wait()
    own = "self_device_time_total" if lab.cuda else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: getattr(event, own), reverse=True)
    for i, event in enumerate(events[:15], 1):
        lab.note(f"{i:2}. by time", f"{getattr(event, own) / 1e3:.2f} ms in {event.count} calls: {event.key[:90]}")
    lab.note("attention", sorted({e.key[:90] for e in events if any(word in e.key.lower() for word in ATTENTION)})[:4])


def runs(lab: Lab) -> None:
    """`train_gpt.py --deterministic`: twice, stopped and resumed, and under torchrun, always with the same final weights."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 257, 2**17)
        (Path(folder) / "data").mkdir()
        for split in ("train_000001", "val_000000"):
            write_shard(Path(folder) / "data" / f"noise_{split}.bin", tokens)
        size = "--n-layer 2 --n-head 2 --d-model 32 --seq-len 32" if lab.quick else "--n-layer 4 --d-model 384 --seq-len 256"
        options = (
            f"--data-dir {folder}/data --results-dir {folder} --device {lab.device.type} --deterministic {size} "
            f"--vocab-size 512 --batch-size 8 --val-tokens 2048 --optimizer mvr3 --compile {'off' if lab.quick else 'on'}"
        ).split()

        def command(name: str, *more: str, launcher: str = "") -> list[str]:
            return [sys.executable, *launcher.split(), str(ROOT / "train_gpt.py"), *options, "--run-name", name, *more]

        first = {
            "whole": command("whole", "--steps", "8"),
            "again": command("again", "--steps", "8"),
            "stopped": command("resumed", "--steps", "3"),
        }
        second = {
            "resumed": command("resumed", "--steps", "8", "--resume", "auto"),
            "torchrun": command(
                "torchrun", "--steps", "8", launcher="-m torch.distributed.run --standalone --nproc_per_node=1"
            ),
        }
        for wave in (first, second):
            for name, (code, said) in side_by_side(wave).items():
                lab.check(f"{name}: exit code", abs(code), 0)
                if code:
                    lab.note(f"{name}: the end of its output", said[-1500:])
        whole = load_file(f"{folder}/whole/model.safetensors")
        for name in ("again", "resumed", "torchrun"):
            weights = load_file(f"{folder}/{name}/model.safetensors")
            lab.check(
                f"{name}: tensors that differ from the first run's", sum(not w.equal(weights[n]) for n, w in whole.items()), 0
            )


def side_by_side(commands: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Run the commands at the same time. Returns the exit code and output of each. No process outlives this call."""
    started = {}
    for name, command in commands.items():
        started[name] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        return {name: (process.wait(), said) for name, process in started.items() for said in [process.communicate()[0]]}
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
        for process in started.values():
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()


class Section(NamedTuple):
    run: Callable[[Lab], None]
    share: float  # of the budget: its deadline


# The most useful first. The shares sum to more than 1: most sections end long before their deadline.
SECTIONS = [
    Section(environment, 0.1), Section(optimizers, 0.15), Section(polar_factor, 0.1), Section(ranks, 0.15),
    Section(compilation, 0.3), Section(throughput, 0.2), Section(steps, 0.25), Section(kernels, 0.2), Section(runs, 0.4),
]  # fmt: skip


# Running them -----------------------------------------------------------------------------------------------------------


def work(section: Section, device: str, quick: bool, answers: Connection) -> None:
    """Run a section in this process, and send its results."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped at its deadline"))
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        section.run(Lab(device, quick, answers))
    except Exception as error:
        traceback.print_exc()
        answers.send(("failed", f"{type(error).__name__}: {str(error)[:400]}"))
        sys.exit(1)


def run_section(section: Section, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Run a section in a new process. Returns its notes and checks, including those from before an error or the deadline."""
    context = multiprocessing.get_context("fork")  # safe, because this process never touches the device
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(section, device, quick, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    result: dict[str, Any] = {"section": section.run.__name__, "notes": {}, "checks": [], "failed": ""}
    try:
        while (left := start + seconds - time.monotonic()) > 0 and ours.poll(left):
            try:
                kind, *values = ours.recv()
            except EOFError:
                break
            if kind == "note":
                result["notes"][values[0]] = values[1]
            elif kind == "check":
                result["checks"].append(dict(zip(("what", "value", "most", "passed"), values, strict=True)))
            else:
                result["failed"] = values[0]
    except BaseException:  # Ctrl-C
        process.kill()
        end(process, at_once=True)
        raise
    late = time.monotonic() >= start + seconds
    end(process, at_once=not late)
    if not result["failed"] and (late or process.exitcode):
        result["failed"] = f"not finished after {seconds:.0f} s" if late else f"exit code {process.exitcode}"
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def end(process: Any, at_once: bool) -> None:
    """End a section's process and the rest of the process group that it leads."""
    if not at_once:
        process.terminate()
    process.join(10)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def verdicts(results: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "section", "check", "value", "at most"]]
    for result in results:
        for check in result["checks"]:
            verdict = "PASS" if check["passed"] else "FAIL"
            rows.append([verdict, result["section"], check["what"], shown(check["value"]), shown(check["most"])])
        if result["failed"]:
            rows.append(["FAIL", result["section"], result["failed"].replace("\n", " ").replace("|", "/"), "", ""])
    return rows


def write(out: Path, results: list[dict[str, Any]], command: str) -> None:
    """Rewrite both files, each atomically."""
    parts = [f"# The first minutes on a GPU\n\nWritten by `{command}`.\n"]
    for result in results:
        rows = [["", "value"], *([name, shown(value)] for name, value in result["notes"].items())]
        title = f"## {result['section']} ({result['seconds']} s)\n"
        parts.append(title + (f"\n{markdown(rows)}" if len(rows) > 1 else ""))
    parts.append("## Passes and failures\n\n" + markdown(verdicts(results)))
    write_text(out / "gpu_day.md", "\n".join(parts))
    write_text(out / "gpu_day.json", json.dumps(results, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does the script run?")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here; --device cpu --quick shows whether the script runs")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"), "TRITON_CACHE_DIR": str(CACHE / "triton")}
    os.environ.setdefault("OMP_NUM_THREADS", "1" if args.device == "cpu" else "4")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for --deterministic
    command = f"python -m benchmarks.gpu_day --device {args.device}" + " --quick" * args.quick
    end_of_budget = time.monotonic() + args.budget
    results: list[dict[str, Any]] = []
    for section in SECTIONS:
        name = section.run.__name__
        left = end_of_budget - time.monotonic() - 12  # ending a section may take so long
        if left <= 0:
            results.append({"section": name, "notes": {}, "checks": [], "failed": "no time was left", "seconds": 0.0})
        else:
            print(f"{name} …", flush=True)
            results.append(run_section(section, args.device, args.quick, min(left, section.share * args.budget)))
        write(args.out, results, command)
    rows = verdicts(results)
    print(aligned(rows, left=3))
    failures = sum(row[0] == "FAIL" for row in rows)
    print(f"{len(rows) - 1 - failures} passed, {failures} failed; {args.out / 'gpu_day.md'} has the numbers")
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the section is ended too
    with one_line_errors("benchmarks.gpu_day"):
        sys.exit(main())
