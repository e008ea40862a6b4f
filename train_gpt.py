"""Train a GPT with Gluon, momentum variance reduction, AdamW or an optimizer of your own.

    python train_gpt.py --config configs/quickstart_mvr2.py                              one device, CUDA or CPU
    torchrun --nproc_per_node=8 train_gpt.py --config configs/mvr1_b512.py               eight GPUs
    python train_gpt.py --help                                                           every option

This file is the outline of a run: data, model, optimizer, schedule, the loop. You can follow an algorithm without reading
`training/`.
"""

import os
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import leave, one_line_errors
from training.config import Config, load_config

if __name__ == "__main__":  # mistakes in the options are reported before torch is imported, which takes seconds
    with one_line_errors("train_gpt"):
        CONFIG = load_config(sys.argv[1:])

import torch
from torch import Tensor, nn

from data.loader import TokenStream
from model import GPT, GPTConfig
from training import checkpoint, numerics
from training.batch import micro_batch_size, open_data
from training.checkpoint import Checkpointer, Position
from training.finite import FiniteGuard
from training.last_gradient import LastGradient
from training.metrics import Clock, Metrics, Progress
from training.optimizers import build_optimizer, is_deferred, schedule
from training.ranks import Ranks, StopSignal
from training.run_folder import ask_for_requeue, find_start, forget_requeue, hold, lock_of, prepare_run


def train(config: Config) -> Path:
    """Join the ranks, and run. Returns the run's folder.

    A notebook or a program may call it too, more than once. It restores what a run changes in the process (signal handlers,
    torch's deterministic mode) and ends its threads. It seeds torch's global generators with `seed` and does not put them back.
    Raises UserError for a failure that the user can fix.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for --deterministic
    ranks = Ranks.start(config.device, config.rank_timeout)
    with ExitStack() as at_end, ranks.naming_lost_ranks():
        run_dir = run(config, ranks, at_end)
        ranks.close()
    return run_dir


def run(config: Config, ranks: Ranks, at_end: ExitStack) -> Path:
    """One run, from its config to its last checkpoint. `at_end` collects what must be restored, also after an error."""
    device = ranks.device
    on_cuda = device.type == "cuda"
    torch.manual_seed(config.seed)
    numerics.settle(config, at_end)

    # Data: the same global stream of batches for every world size.
    loader, val_stream = ranks.together(lambda: open_data(config, ranks))
    at_end.callback(loader.close)

    # Model and optimizer: `model` keeps the names, `compiled` is what runs, `net` also averages gradients over the ranks.
    dtype = numerics.choose_dtype(config, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len))
    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    compiled: Any = numerics.compiled(model, config, device, at_end)
    net: Any = ranks.replicate(compiled)
    optimizer: Any = ranks.together(lambda: build_optimizer(model, config))
    set_schedule = schedule(optimizer, config)
    deferred = is_deferred(optimizer)
    rows = config.batch_size // ranks.size
    micro = min(ranks.gather(micro_batch_size(config, rows, device, dtype == "bfloat16")))

    # Where to start, and where to write.
    run_dir = Path(config.results_dir) / config.run_name
    lock = lock_of(run_dir)
    source, state = ranks.agree(lambda: find_start(run_dir, config))
    last_gradient = None  # the gradient that MuonMVR compares with, if it needs an extra pass
    if config.compare_with != "last_step":
        last_gradient = LastGradient(optimizer, config.compare_with, loader, lambda *batch: gradients(*batch))
    warm_up(net, (micro, config.seq_len) if compiled is not model else (1, 1), ranks, autocast)
    position = Position()
    if source is not None and state is not None:
        ranks.together(lambda: checkpoint.load(source, state, model, optimizer))
        position = Position.of(state)
    start = position.step
    ranks.agree(lambda: hold(lock, run_dir))
    at_end.callback(lock.release)
    ranks.agree(lambda: prepare_run(run_dir, config, source, state))
    checkpoints = Checkpointer(run_dir, ranks, config.keep_checkpoints, config.keep_every)
    at_end.callback(checkpoints.close)
    metrics = Metrics(run_dir, config, ranks, position.metrics_bytes)
    at_end.callback(metrics.close)
    finite = FiniteGuard(model, optimizer, ranks, config, position)
    stop = at_end.enter_context(StopSignal(ranks))
    if ranks.first:
        forget_requeue(run_dir)
    clock = Clock(position, device)
    progress = Progress(config, ranks, position, model.flops_per_token(config.seq_len))
    at_end.callback(progress.close)
    progress.say(
        f"{config.run_name}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.optimizer}, {dtype} on "
        f"{ranks.size} × {torch.cuda.get_device_name(device) if on_cuda else device.type}\n"
        f"{config.batch_size} sequences of {config.seq_len} tokens a step = {ranks.size} ranks × {rows // micro} micro-batches "
        f"× {micro} sequences; steps {start} to {config.steps}" + (f", from {source}" if source else "")
    )

    def updates() -> int:
        """The index of the weights that the model now holds."""
        return getattr(optimizer, "updates", position.step - position.skipped)

    def record(update: int, **losses: float) -> None:
        finite.settle(**losses)
        extra = {"skipped": position.skipped} if position.skipped else {}
        metrics.write(
            update=update, tokens=update * config.batch_size * config.seq_len,
            passes=whole(position.evaluated / config.batch_size), seconds=round(clock.seconds, 3), **losses, **extra,
        )  # fmt: skip
        progress.show(update, position.evaluated, clock.seconds, **losses)

    def evaluate() -> None:
        position.validated = updates()
        clock.stop()
        with stop.pause():
            ranks.check_identical(model)
            record(updates(), val_loss=validate(model, compiled, val_stream, micro, config, ranks, autocast))
        clock.start()

    def evaluate_if_due() -> None:
        if updates() % config.val_every == 0 and position.validated != updates() < config.steps:
            evaluate()

    def save() -> None:
        clock.stop()
        with stop.pause():
            finite.check_state()
            position.metrics_bytes = metrics.durable_bytes()
            checkpoints.save(model, optimizer, position, config.to_dict())
        clock.start()

    def gradients(inputs: Tensor, targets: Tensor) -> Tensor:
        """One pass: leaves the batch's gradient in `.grad`. Returns the mean loss of this rank's sequences."""
        optimizer.zero_grad()
        position.evaluated += ranks.size * len(inputs)
        micro_batches = list(zip(inputs.split(micro), targets.split(micro), strict=True))
        total = torch.zeros((), device=device)
        for i, (x, y) in enumerate(micro_batches):
            with nullcontext() if ranks.size == 1 or i == len(micro_batches) - 1 else net.no_sync():
                with autocast:
                    loss = net(x, y) * (len(x) / rows)
                loss.backward()
            total = total + loss.detach()
        finite.look(total)
        return total

    clock.start()
    evaluate_if_due()  # at the start, and when a finished run is extended
    stopped = ""
    for step in range(start, config.steps):
        set_schedule(step)
        batch = loader.batch(step)
        before, loss = updates(), None
        with finite.step(step):  # with --on-nan skip, a step that is not finite ends early and has no loss
            if last_gradient is not None:
                last_gradient.record(step, batch)
            loss = optimizer.step(partial(gradients, *batch))
        position.step = step + 1
        at = updates() if deferred else before

        if loss is not None and at % config.log_every == 0:
            record(at, train_loss=ranks.mean(loss).item())
        evaluate_if_due()
        progress.step()
        stopped = stop.agreed()
        if stopped or step + 1 == config.steps or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
            save()
        if stopped:
            break

    stop.finish()
    if start == config.steps:
        progress.say(f"all {config.steps} steps are done; a larger --steps continues")
    ranks.together(checkpoints.finish)
    if stopped:
        if ranks.first and stopped == "preempted":
            ask_for_requeue(run_dir)
        progress.say(f"stopped after step {position.step} of {config.steps}; --resume auto continues from there")
    else:
        if deferred:
            optimizer.flush()
        if position.validated != updates():
            evaluate()
        finite.check_state()
        ranks.agree(lambda: checkpoint.save_weights(run_dir / "model.safetensors", model))
        count = whole(position.evaluated / config.batch_size)
        progress.say(f"{config.run_name}: {updates()} updates, {count} gradient evaluations, {clock.seconds:.1f} s")
    progress.close()
    ranks.agree(metrics.finish)
    return run_dir


def warm_up(net: nn.Module, shape: tuple[int, int], ranks: Ranks, autocast: torch.autocast) -> None:
    """Two passes on zeros, whose gradients are dropped.

    DDP changes the layout of its buckets after its first reduction, and the layout sets the order of summation. After these
    passes a resumed run sums in the same order as one that was never stopped. They also compile the model before the clock
    starts.
    """
    tokens, targets = torch.zeros((2, *shape), dtype=torch.int64, device=ranks.device)  # the same tensor twice is another graph
    for _ in range(2):
        with autocast:
            loss = net(tokens, targets)
        loss.backward()
        net.zero_grad()


@torch.no_grad()
def validate(
    model: nn.Module,
    compiled: nn.Module,
    stream: TokenStream,
    micro: int,
    config: Config,
    ranks: Ranks,
    autocast: torch.autocast,
) -> float:
    """Mean loss over the first `val_tokens` tokens of the validation split, shared among the ranks."""
    sequences = config.val_tokens // config.seq_len
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for start in range(ranks.rank * micro, sequences, ranks.size * micro):
        rows = range(start, min(start + micro, sequences))
        tokens = torch.stack([torch.from_numpy(stream.read(j * config.seq_len, (j + 1) * config.seq_len + 1)) for j in rows])
        tokens = (tokens.pin_memory() if ranks.device.type == "cuda" else tokens).to(
            ranks.device, torch.int64, non_blocking=True
        )
        net = compiled if len(rows) == micro else model  # a smaller last batch is not worth compiling for
        with autocast:
            total += net(tokens[:, :-1], tokens[:, 1:]).double() * len(rows)
    return (ranks.total(total) / sequences).item()


def whole(number: float) -> int | float:
    """3.0 becomes 3, which reads better in the metrics; 2.5 stays."""
    return int(number) if number.is_integer() else number


if __name__ == "__main__":
    with one_line_errors("train_gpt"):
        train(CONFIG)
    leave()
