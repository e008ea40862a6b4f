"""Train a GPT with Gluon, Gluon-MVR-1, -2, -3 or AdamW.

    python train_gpt.py --config configs/quickstart_mvr1.py                              one device, CUDA or CPU
    torchrun --nproc_per_node=8 train_gpt.py --config configs/mvr1_b512.py               eight GPUs
    python train_gpt.py --help                                                           every option

This file is the outline of a run: data, model, optimizer, schedule, the loop. `training/` holds what an author of an
algorithm may skip.
"""

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from common.errors import UserError, leave, one_line_errors
from training.config import Config, load_config

if __name__ == "__main__":  # a mistake in the options is told before torch takes its seconds to load
    with one_line_errors("train_gpt"):
        CONFIG = load_config(sys.argv[1:])

import torch
from torch import Tensor, nn

from data import embedded
from data.loader import BatchLoader, TokenStream
from data.shards import list_shards
from model import GPT, GPTConfig
from optim import Gluon, GluonMVR1, GluonMVR2, GluonMVR3
from training import checkpoint
from training.checkpoint import Checkpointer
from training.finite import FiniteGuard
from training.metrics import Clock, Metrics, Progress
from training.ranks import Ranks, StopSignal
from training.run_folder import ask_for_requeue, find_start, forget_requeue, hold, lock_of, prepare_run

OPTIMIZERS = {"gluon": Gluon, "mvr1": GluonMVR1, "mvr2": GluonMVR2, "mvr3": GluonMVR3, "adamw": Gluon}


def build_optimizer(model: GPT, config: Config) -> Gluon:
    """Matrices of the blocks in one norm ball, the tied embedding in another; every parameter exactly once."""
    norms = ("adamw", "adamw") if config.optimizer == "adamw" else (config.block_norm, config.embed_norm)
    groups = [
        {"params": list(model.blocks.parameters()), "norm": norms[0], "radius": config.block_radius},
        {"params": [model.embedding.weight], "norm": norms[1], "radius": config.embed_radius},
    ]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
    for group in groups:
        if group["norm"] == "adamw":  # its learning rate is lr itself
            group["radius"] = 1.0
    options = {}
    if config.optimizer in ("mvr1", "mvr2", "mvr3"):
        options["gamma"] = config.gamma
    if config.optimizer in ("mvr2", "mvr3"):
        options["correction_fraction"] = 1 / config.correction_every
    if config.optimizer == "mvr2":
        options["inner"] = config.inner or None
    return OPTIMIZERS[config.optimizer](
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, scale=config.scale,
        polar=config.polar, betas=(config.beta1, config.beta2), eps=config.eps, **options,
    )  # fmt: skip


def schedule(config: Config, step: int) -> dict[str, float]:
    """lr, momentum and gamma of a step. The theory's are those of the papers' decreasing step sizes, without warm-up."""
    if config.schedule == "theory":
        power, weight = (-3 / 4, -1 / 2) if config.optimizer in ("gluon", "adamw") else (-2 / 3, -2 / 3)
        return {"lr": config.lr * (step + 1) ** power, "momentum": 1 - (step + 1) ** weight, "gamma": config.gamma}
    rise = min(1.0, (step + 1) / (config.warmup_steps + 1))
    fall = 1.0
    if config.schedule == "linear" and config.warmdown_steps:
        fall = min(1.0, (config.steps - step) / min(config.warmdown_steps, config.steps))

    def follow(start: float, end: float) -> float:
        return start if end < 0 else start + (end - start) * (1 - fall)

    momentum, gamma = follow(config.momentum, config.momentum_end), follow(config.gamma, config.gamma_end)
    return {"lr": config.lr * min(rise, fall), "momentum": momentum, "gamma": gamma}


def set_schedule(optimizer: Gluon, config: Config, step: int) -> None:
    """Give every group what the schedule says of a step, but for what its optimizer does not have."""
    values = schedule(config, step)
    for group in optimizer.param_groups:
        group.update((name, value) for name, value in values.items() if name in group)


@torch.no_grad()
def validate(model: nn.Module, stream: TokenStream, config: Config, ranks: Ranks, autocast: torch.autocast) -> float:
    """Mean loss over the first `val_tokens` tokens of the validation split, shared among the ranks."""
    sequences, most = config.val_tokens // config.seq_len, config.micro_batch_size
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for start in range(ranks.rank * most, sequences, ranks.size * most):
        rows = range(start, min(start + most, sequences))
        tokens = torch.stack([torch.from_numpy(stream.read(j * config.seq_len, (j + 1) * config.seq_len + 1)) for j in rows])
        tokens = tokens.to(ranks.device, torch.int64)
        with autocast:
            total += model(tokens[:, :-1], tokens[:, 1:]).double() * len(rows)
    return (ranks.total(total) / sequences).item()


def train(config: Config) -> None:
    """Start this process's place among the ranks, and run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what --deterministic needs of cuBLAS
    ranks = Ranks.start(config.device, config.rank_timeout)
    with ranks.naming_the_lost():
        run(config, ranks)
    ranks.close()


def run(config: Config, ranks: Ranks) -> None:
    """One run, from its config to its last checkpoint."""
    device = ranks.device
    on_cuda = device.type == "cuda"
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)

    # Data: the same global stream of batches for every world size.
    loader, val_stream = ranks.together(lambda: open_data(config, ranks))
    rows = config.batch_size // ranks.size
    micro = max(m for m in range(1, min(rows, config.micro_batch_size) + 1) if rows % m == 0)
    every = config.correction_every
    if rows % every:
        raise UserError(f"correction_every = {every} must divide the {rows} sequences of a rank; choose a divisor")

    # Model and optimizer: `model` keeps the names, `compiled` is what runs, `net` also reduces gradients over the ranks.
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if on_cuda else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len))
    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    compiled = torch.compile(model) if config.compile == "on" or (config.compile == "auto" and on_cuda) else model
    net = ranks.replicate(compiled)
    optimizer = build_optimizer(model, config)

    # Where to start, and where to write.
    run_dir = Path(config.results_dir) / config.run_name
    lock = lock_of(run_dir)
    source, state = ranks.agree(lambda: find_start(run_dir, config))
    start, evaluated, skipped, validated, seconds, metrics_bytes = 0, 0, 0, None, 0.0, 0
    if source is not None:
        ranks.together(lambda: checkpoint.load(source, state, model, optimizer))
        start, evaluated, skipped, validated, seconds, metrics_bytes = (
            state[key] for key in ("step", "evaluated", "skipped", "validated", "seconds", "metrics_bytes")
        )
    ranks.agree(lambda: hold(lock, run_dir))
    ranks.agree(lambda: prepare_run(run_dir, config, source, state))
    checkpoints = Checkpointer(run_dir, ranks, config.keep_checkpoints, config.keep_every)
    metrics = Metrics(run_dir, config, ranks, metrics_bytes)
    finite = FiniteGuard(model, optimizer, loader, ranks, config.on_nan, skipped)
    stop = StopSignal(ranks)
    if ranks.first:
        forget_requeue(run_dir)
    clock = Clock(seconds)
    progress = Progress(config, ranks, start, model.flops_per_token(config.seq_len))
    first_evaluated, first_second = evaluated, seconds
    progress.say(
        f"{config.run_name}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.optimizer}, {dtype} on "
        f"{ranks.size} × {torch.cuda.get_device_name(device) if on_cuda else device.type}\n"
        f"{config.batch_size} sequences of {config.seq_len} tokens a step = {ranks.size} ranks × {rows // micro} micro-batches "
        f"× {micro} sequences; steps {start} to {config.steps}" + (f", from {source}" if source else "")
    )

    def record(update: int, **losses: float) -> None:
        finite.settle(**losses)
        extra = {"skipped": finite.skipped} if finite.skipped else {}
        spike = metrics.write(
            update=update, tokens=update * config.batch_size * config.seq_len, passes=whole(evaluated / config.batch_size),
            seconds=round(clock.seconds, 3), **losses, **extra,
        )  # fmt: skip
        if spike:
            progress.say(f"update {update}: the loss jumped to {losses['train_loss']:.4f}, {spike:.1f} deviations up")
        progress.show(update, evaluated - first_evaluated, clock.seconds - first_second, **losses)

    def evaluate() -> None:
        nonlocal validated
        validated = optimizer.updates
        clock.stop()
        ranks.check_identical(model)
        record(optimizer.updates, val_loss=validate(compiled, val_stream, config, ranks, autocast))
        clock.start()

    def save(step: int) -> None:
        finite.check_state()
        position = {
            "evaluated": evaluated, "skipped": finite.skipped, "validated": validated, "seconds": clock.seconds,
            "metrics_bytes": metrics.durable_bytes(), "config": config.to_dict(),
        }  # fmt: skip
        checkpoints.save(step, model, optimizer, position)

    def gradients(inputs: Tensor, targets: Tensor, reduce: bool = True) -> Tensor:
        """Add these sequences' share of the gradient of the batch's mean loss to `.grad`; return their share of the loss."""
        nonlocal evaluated
        evaluated += ranks.size * len(inputs)
        micro_batches = list(zip(inputs.split(micro), targets.split(micro), strict=True))
        total = torch.zeros((), device=device)
        for i, (x, y) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with nullcontext() if ranks.size == 1 or (reduce and last) else net.no_sync():
                with autocast:
                    loss = net(x, y) * (len(x) / rows)
                loss.backward()
            total = total + loss.detach()
        finite.look(total)
        return total

    def evaluate_where_due() -> None:
        if optimizer.updates % config.val_every == 0 and validated != optimizer.updates < config.steps:
            evaluate()

    clock.start()
    evaluate_where_due()  # at the start, and where a finished run is extended: its last weights are now on the way
    stopped = ""
    for step in range(start, config.steps):
        set_schedule(optimizer, config, step)

        # One of `every` sequences takes part in the correction, and so in both passes. MVR-2's pass at the previous weights
        # adds to the gradient that a later pass reduces: one reduction a step.
        batch = [tokens.unflatten(0, (-1, every)) for tokens in loader.batch(step)]
        shared = [tokens[:, 0] for tokens in batch]
        passes = [
            partial(gradients, *shared, reduce=every == 1),
            partial(gradients, *shared, reduce=config.optimizer == "mvr3"),
        ]
        if every > 1:
            passes.append(partial(gradients, *(tokens[:, 1:].flatten(0, 1) for tokens in batch)))
        before, loss = optimizer.updates, None
        with finite.step(step):  # with --on-nan skip, a step whose numbers are not finite ends here and leaves no loss
            loss = optimizer.step(*passes)
        at = optimizer.updates if config.optimizer == "mvr2" else before

        if loss is not None and at % config.log_every == 0:
            record(at, train_loss=ranks.mean(loss).item())
        evaluate_where_due()
        progress.step()
        stopped = stop.agreed()
        if stopped or step + 1 == config.steps or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
            save(step + 1)
        if stopped:
            break

    if start == config.steps:
        progress.say(f"all {config.steps} steps were done; --steps more goes on")
    ranks.together(checkpoints.finish)
    if stopped:
        if ranks.first and stopped == "preempted":
            ask_for_requeue(run_dir)
        progress.say(f"stopped after step {step + 1} of {config.steps}; --resume auto goes on from there")
    else:
        optimizer.flush()
        if validated != optimizer.updates:
            evaluate()
        finite.check_state()
        ranks.agree(lambda: checkpoint.save_weights(run_dir / "model.safetensors", model))
        count = whole(evaluated / config.batch_size)
        progress.say(f"{config.run_name}: {optimizer.updates} updates, {count} gradient evaluations, {clock.seconds:.1f} s")
    progress.close()
    ranks.agree(metrics.close)
    loader.close()


def whole(number: float) -> int | float:
    """3.0 as 3, for those who read the metrics; 2.5 as it is."""
    return int(number) if number.is_integer() else number


def open_data(config: Config, ranks: Ranks) -> tuple[BatchLoader, TokenStream]:
    """The batches and the validation split. Raises UserError where the data can't be what the config asks for."""
    if config.text and not list_shards(config.data_dir):
        embedded.prepare(config.data_dir)  # one process builds it, and the others wait for that one
    val_stream = TokenStream(config.data_dir, "val")
    loader = BatchLoader(
        TokenStream(config.data_dir, "train"), batch_size=config.batch_size, seq_len=config.seq_len, rank=ranks.rank,
        world_size=ranks.size, device=ranks.device, vocab_size=config.vocab_size,
        shuffle_seed=config.seed if config.shuffle else None,
    )  # fmt: skip
    check_tokens(config, loader, val_stream)
    return loader, val_stream


def check_tokens(config: Config, loader: BatchLoader, val_stream: TokenStream) -> None:
    """Raise UserError where the data would wrap around, or can't be what a validation asks for."""
    if config.steps > loader.steps:
        need = config.steps * config.batch_size * config.seq_len + 1
        raise UserError(
            f"{config.steps} steps need {need:,} tokens and {config.data_dir} has {loader.stream.tokens:,}: get more shards "
            f"(FineWeb: python -m data.fineweb --shards {-(-need // 100_000_000)}) or --steps {loader.steps}"
        )
    if not config.seq_len <= config.val_tokens < val_stream.tokens:
        raise UserError(
            f"val_tokens = {config.val_tokens:,} must be from one sequence ({config.seq_len}) to the {val_stream.tokens - 1:,} "
            f"tokens of {config.data_dir}'s validation shards; set --val-tokens"
        )
    tokens = val_stream.read(0, config.val_tokens + 1)
    if tokens.max() >= config.vocab_size:
        path, index = val_stream.locate(int(tokens.argmax()))
        raise UserError(
            f"{path}: token {tokens.max()} (number {index} of the shard) is outside the model's vocabulary "
            f"of {config.vocab_size}"
        )


if __name__ == "__main__":
    with one_line_errors("train_gpt"):
        train(CONFIG)
    leave()
