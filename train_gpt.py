"""Train a GPT with Gluon, momentum variance reduction, AdamW or an optimizer of your own.

    python train_gpt.py --config configs/quickstart_mvr2.py                              one device, CUDA or CPU
    torchrun --nproc_per_node=8 train_gpt.py --config configs/mvr1_b512.py               eight GPUs
    python train_gpt.py --help                                                           every option

This file is the outline of a run: data, model, optimizer, schedule, the loop. You can follow an algorithm without reading
`training/`.
"""

import math
import os
import sys
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from common.errors import UserError, failure_of, leave, one_line_errors
from training.config import Config, load_config

if __name__ == "__main__":  # mistakes in the options are reported before torch is imported, which takes seconds
    with one_line_errors("train_gpt"):
        CONFIG = load_config(sys.argv[1:])

import numpy as np
import torch
from torch import Tensor

from data.loader import TokenStream
from model import GPT, GPTConfig
from training import checkpoint, numerics
from training.checkpoint import Position
from training.driver import can_resume, validating
from training.finite import FiniteGuard
from training.inputs import identity, micro_batch_size, open_data
from training.last_gradient import LastGradient
from training.metrics import Clock, Metrics, Progress
from training.optimizers import build_optimizer, is_deferred, schedule, updates_of
from training.ranks import Ranks
from training.rehearsal import drive
from training.resume import check_data, own_options
from training.run_folder import ask_for_requeue, find_start, hold, lock_of, prepare_run
from training.saver import Saver
from training.stop import StopSignal


def train(config: Config) -> Path:
    """Join the ranks, and run. Returns the run's folder.

    A notebook or a program may call it too, more than once. It restores what a run changes in the process (signal handlers,
    torch's deterministic mode) and ends its threads. It seeds torch's global generators with `seed` and does not put them back.
    Raises UserError for a failure that the user can fix.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for --deterministic
    ranks = Ranks.start(config.device, config.rank_timeout)
    with ExitStack() as at_end, ranks.naming_lost_ranks(), numerics.reproducible_products():
        run_dir = run(config, ranks, at_end)
        ranks.close()
    return run_dir


def run(config: Config, ranks: Ranks, at_end: ExitStack) -> Path:
    """One run, from its config to its last checkpoint. `at_end` collects what must be restored, also after an error."""
    device = ranks.device

    # Where to start. Nothing is written yet. A resumed run has its own options, where the command line names no others.
    run_dir = Path(config.results_dir) / config.run_name
    source, state = ranks.on_first(find_start, run_dir, config)
    config, notes = ranks.on_first(own_options, run_dir, config, source, state)
    position = Position.of(state)
    torch.manual_seed(config.seed)
    numerics.set_switches(config, at_end)

    # Data: the same global stream of batches for every world size.
    loader, val_stream = ranks.on_all(open_data, config, ranks)
    at_end.callback(loader.close)
    data = identity(loader, val_stream)
    notes += ranks.on_all(check_data, config, source, state, data)

    # Model and optimizer.
    dtype = numerics.choose_dtype(config, device)
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len))
    model.to(device, torch.float64 if dtype == "float64" else torch.float32)
    compiled: Any = ranks.on_all(numerics.compiled, model, config, ranks, at_end)
    optimizer: Any = drive(ranks.on_all(build_optimizer, model, config), model, config, ranks)
    set_schedule = schedule(optimizer, config)
    deferred, resumable = is_deferred(optimizer), can_resume(optimizer)
    finite = FiniteGuard(model, optimizer, ranks, config, position.skipped)
    net = Net(model, compiled, config, ranks, dtype, finite, position.sequences)
    last_gradient = None  # the gradient that MuonMVR compares with, if it needs an extra pass
    if config.compare_with != "last_step":
        last_gradient = LastGradient(optimizer, config.compare_with, loader, net.gradients)
    net.warm_up()
    if source is not None and state is not None:
        ranks.on_all(checkpoint.load, source, state, model, optimizer)

    # Where to write.
    lock = lock_of(run_dir)
    ranks.on_first(hold, lock, run_dir)
    at_end.callback(lock.release)
    ranks.on_first(prepare_run, run_dir, config, source, state)
    saver = Saver(run_dir, ranks, config.keep_checkpoints, config.keep_every, data)
    at_end.callback(saver.close)
    metrics = Metrics(run_dir, config, ranks, position.metrics_bytes)
    at_end.callback(metrics.close)

    # What watches.
    stop = at_end.enter_context(StopSignal(ranks))
    clock = Clock(device, position.seconds)
    progress = Progress(config, ranks, position, model.flops_per_token(config.seq_len))
    at_end.callback(progress.close)
    progress.say(_opening(config, ranks, net, model, dtype))
    progress.say("\n".join([f"steps {position.step} to {config.steps}" + (f", from {source}" if source else ""), *notes]))

    def record(update: int, **losses: float) -> None:
        """Write losses at the weights number `update`, and show them."""
        finite.check(**losses)
        skipped = {"skipped": finite.skipped} if finite.skipped else {}
        metrics.write(
            update=update, tokens=update * config.batch_size * config.seq_len, passes=net.passes,
            seconds=round(clock.seconds, 3), **losses, **skipped,
        )  # fmt: skip
        progress.show(update, net.sequences, clock.seconds, **losses)

    def validate(update: int) -> int:
        """Validate the weights that the model holds, number `update`. Returns the number."""
        with clock.stopped(), stop.pause(), validating(optimizer):
            ranks.check_identical(model)
            record(update, val_loss=net.validate(val_stream))
        return update

    # The loop. `update` is the index of the weights that the model holds.
    clock.start()
    validated, stopped = position.validated, ""
    update = updates_of(optimizer, position.step - finite.skipped)
    if update % config.val_every == 0 and validated != update < config.steps:  # at the start, and when a run is extended
        validated = validate(update)
    for step in range(position.step, config.steps):
        set_schedule(step)
        batch = loader.batch(step)
        before, loss = update, None
        with finite.step(step):  # with --on-nan skip, a step that is not finite ends early and has no loss
            if last_gradient is not None:
                last_gradient.before_step(step, batch)
            loss = optimizer.step(partial(net.gradients, batch))
        update = updates_of(optimizer, step + 1 - finite.skipped)
        at = update if deferred else before  # the weights that `loss` belongs to

        if loss is not None and at % config.log_every == 0:
            record(at, train_loss=ranks.mean(loss).item())
        if update % config.val_every == 0 and validated != update < config.steps:
            validated = validate(update)
        progress.step()
        stopped = stop.agreed()
        due = config.checkpoint_every and (step + 1) % config.checkpoint_every == 0
        if resumable and (due or stopped or step + 1 == config.steps):
            with clock.stopped(), stop.pause():
                finite.check_state()
                size = metrics.durable_bytes()
                reached = Position(step + 1, net.sequences, finite.skipped, validated, clock.seconds, size)
                saver.save(model, optimizer, reached, config.to_dict())
        if stopped:
            break

    # The end. A run writes its weights even if its last checkpoint could not be written.
    stop.finish()
    if position.step == config.steps:
        progress.say(f"all {config.steps} steps are done; a larger --steps continues")
    lost = failure_of(ranks.on_all, saver.finish)
    if stopped and resumable and not lost:
        if ranks.first and stopped == "preempted":
            ask_for_requeue(run_dir)
        progress.say(f"stopped after step {step + 1} of {config.steps}; --resume auto continues from there")
    elif not (stopped and resumable):
        if deferred:
            optimizer.flush()
        update = updates_of(optimizer, (step + 1 if stopped else config.steps) - finite.skipped)
        with validating(optimizer):
            if validated != update:
                validate(update)
            finite.check_state()
            unwritten = failure_of(ranks.on_first, checkpoint.save_weights, run_dir / "model.safetensors", model)
        lost = lost or unwritten
        progress.say(f"{config.run_name}: {update} updates, {net.passes} gradient evaluations, {clock.seconds:.1f} s")
    if lost:
        raise UserError(lost, everywhere=True)
    progress.close()
    ranks.on_first(metrics.finish)
    return run_dir


def _opening(config: Config, ranks: Ranks, net: "Net", model: GPT, dtype: str) -> str:
    """What a run says of itself at its start."""
    on = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    return (
        f"{config.run_name}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.optimizer}, {dtype} on "
        f"{ranks.size} × {on}\n{config.batch_size} sequences of {config.seq_len} tokens a step = {ranks.size} ranks × "
        f"{net.rows // net.micro} micro-batches × {net.micro} sequences"
    )


class Net:
    """The model as the ranks run it together: the gradient of a batch, and the validation loss.

    `model` keeps the names of the weights, and `compiled` is what runs. `rows`: sequences of a batch on this rank. `micro`:
    sequences in a forward pass. `sequences`: how many gradients of sequences the run has computed so far, over all ranks.
    """

    def __init__(
        self, model: GPT, compiled: Any, config: Config, ranks: Ranks, dtype: str, finite: FiniteGuard, sequences: int = 0
    ) -> None:
        self._model, self._compiled, self._config, self._ranks, self._finite = model, compiled, config, ranks, finite
        self._replica: Any = ranks.replicate(compiled)  # also averages gradients over the ranks
        self._autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        self.rows = config.batch_size // ranks.size
        self.micro = min(ranks.gather(micro_batch_size(config, self.rows, ranks.device, dtype == "bfloat16")))
        self.sequences = sequences

    @property
    def passes(self) -> int:
        """Gradient evaluations of whole batches so far."""
        return self.sequences // self._config.batch_size

    def gradients(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One pass: leaves the batch's gradient in `.grad`. Returns the mean loss of this rank's sequences."""
        self._model.zero_grad()
        self.sequences += self._ranks.size * self.rows
        inputs, targets = (part.split(self.micro) for part in batch)
        total = torch.zeros((), device=self._ranks.device)
        for i, (x, y) in enumerate(zip(inputs, targets, strict=True), 1):
            with nullcontext() if self._ranks.size == 1 or i == len(inputs) else self._replica.no_sync():
                with self._autocast:
                    loss = self._replica(x, y) * (len(x) / self.rows)
                loss.backward()
            total = total + loss.detach()
        self._finite.look(total)
        return total

    @torch.no_grad()
    def validate(self, stream: TokenStream) -> float:
        """Mean loss over the first `val_tokens` tokens of the validation split, shared among the ranks."""
        length, device, ranks = self._config.seq_len, self._ranks.device, self._ranks
        sequences = self._config.val_tokens // length
        losses = []  # their sum is in double on the host, because not every device has float64
        for start in range(ranks.rank * self.micro, sequences, ranks.size * self.micro):
            rows = range(start, min(start + self.micro, sequences))
            windows = np.stack([stream.read(j * length, (j + 1) * length + 1) for j in rows])
            tokens = torch.from_numpy(windows.astype(np.int64))
            tokens = (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)
            net = self._compiled if len(rows) == self.micro else self._model  # a smaller last batch is not worth compiling for
            with self._autocast:
                losses.append((net(tokens[:, :-1], tokens[:, 1:]), len(rows)))
        return ranks.total(math.fsum(loss.item() * count for loss, count in losses)) / sequences

    def warm_up(self) -> None:
        """Two passes on zeros, whose gradients are dropped.

        DDP changes the layout of its buckets after its first reduction, and the layout sets the order of summation. After
        these passes a resumed run sums in the same order as one that was never stopped. They also compile the model before
        the clock starts.
        """
        shape = (1, 1) if self._compiled is self._model else (self.micro, self._config.seq_len)
        # (The same tensor twice would be another graph.)
        tokens, targets = torch.zeros((2, *shape), dtype=torch.int64, device=self._ranks.device)
        for _ in range(2):
            with self._autocast:
                loss = self._replica(tokens, targets)
            loss.backward()
            self._replica.zero_grad()


if __name__ == "__main__":
    with one_line_errors("train_gpt"):
        train(CONFIG)
    leave()
