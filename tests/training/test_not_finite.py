"""Losses and gradients that are not finite: the run stops and says where, or skips the step without a trace."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

import training.checkpoint
from common.errors import Diverged
from data.loader import BatchLoader, TokenStream
from model import GPT, GPTConfig
from tests.helpers.train_runs import data, on_rank, trainer, undisturbed  # noqa: F401
from training.checkpoint import newest_state
from training.config import Config, load_config
from training.finite import FiniteGuard
from training.optimizers import build_optimizer
from training.ranks import Ranks

MVR2 = "--optimizer mvr2 --q 0.6"
MVR3 = "--optimizer mvr3 --momentum 0.2"
pytestmark = pytest.mark.slow


def poison(step: int, kind: str, rank: int = 0, passes: tuple[int, ...] = (1, 2), last: int | None = None) -> None:
    """On one rank, in steps `step` to `last`: a loss or gradient that is not finite."""
    state = {"step": -1, "pass": 0}
    guarded, look, forward = FiniteGuard.step, FiniteGuard.look, GPT.forward

    def stepping(self, number):
        state.update(step=number, **{"pass": 1})
        return guarded(self, number)

    def looking(self, loss):
        if in_pass() and kind == "gradient":
            dict(self._model.named_parameters())["blocks.1.mlp.fc.weight"].grad[0, 0] = torch.inf
        state["pass"] += 1
        look(self, loss)

    def in_pass() -> bool:
        return on_rank(rank) and step <= state["step"] <= (last or step) and state["pass"] in passes

    def forwarding(self, idx, targets=None):
        out = forward(self, idx, targets)
        return out * torch.nan if in_pass() and kind == "loss" else out

    FiniteGuard.step, FiniteGuard.look, GPT.forward = stepping, looking, forwarding


@pytest.mark.parametrize(
    "kind, ranks, says",
    [
        ("loss", 1, "step 4: the loss is not finite (batch 4: sequences 32 to 39)"),
        ("loss", 2, "step 4: the loss is not finite on rank 1 (batch 4: sequences 32 to 39)"),
        ("gradient", 1, "step 4: the gradient of blocks.1.mlp.fc.weight is not finite (batch 4: sequences 32 to 39)"),
        ("gradient", 2, "step 4: the gradient of blocks.1.mlp.fc.weight is not finite (batch 4: sequences 32 to 39)"),
    ],
)
def test_a_number_that_is_not_finite_stops_all_ranks(trainer, undisturbed, kind, ranks, says):  # noqa: F811
    name = f"poisoned-{kind}-{ranks}"
    patch = functools.partial(poison, 4, kind, rank=ranks - 1)
    done = trainer.run(name, f"{MVR2} --checkpoint-every 2", ranks=ranks, patch=patch)
    assert (
        done.refusal()
        == f"train_gpt: {says}; continue from the last checkpoint with --resume auto, and a lower --lr or --on-nan skip"
    )
    path, state = newest_state(done.folder / "checkpoints")
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in training.checkpoint.load_file(path / "model.safetensors").values())
    trainer.run(name, f"{MVR2} --resume auto", ranks=ranks).ok().same_as(undisturbed(MVR2, ranks))


def drop_batch_4() -> None:
    batch = BatchLoader.batch
    BatchLoader.batch = lambda self, step: batch(self, step if step < 4 else step + 1)


@pytest.mark.parametrize(
    "options, ranks",
    [
        ("--optimizer gluon", 1),
        ("--optimizer adamw", 1),
        (MVR2, 1),
        (MVR2, 2),
        (MVR3, 1),
        ("--optimizer muon_mvr --lr 1e-2 --compare-with previous_weights", 1),
        ("--optimizer torch.optim:AdamW --weight-decay 0", 1),
    ],
)
def test_a_skipped_step_leaves_no_trace(trainer, options, ranks):  # noqa: F811
    """The run is the same as without that batch: for MVR-2 the pending update stays pending."""
    name = f"skips-{options.split()[1]}-{ranks}"
    patch = functools.partial(poison, 4, "loss", rank=ranks - 1)
    skipping = trainer.run(name, f"{options} --on-nan skip --val-every 1", ranks=ranks, patch=patch).ok()
    without = trainer.run(f"{name}-without", f"{options} --val-every 1 --steps 6", ranks=ranks, patch=drop_batch_4).ok()
    assert skipping.out.count("skipped, 1 in all") == 1
    assert {line.get("skipped") for line in skipping.metrics} == {None, 1}
    assert skipping.metrics[-1]["skipped"] == 1 and skipping.metrics[-1]["update"] == 6
    mine, theirs = ([{key: line[key] for key in line if key.endswith("loss") or key == "update"} for line in run.metrics]
                    for run in (skipping, without))  # fmt: skip
    assert mine == theirs
    assert all(np.array_equal(value, without.weights[name]) for name, value in skipping.weights.items())


def fresh_optimizer(trainer, options: str, start: Path, steps) -> dict[str, torch.Tensor]:  # noqa: F811
    """The weights after training on these batches from a run's last weights, with a new optimizer."""
    config = load_config(trainer.words("fresh", options))
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len)).double()
    model.load_state_dict(training.checkpoint.load_file(start / "model.safetensors"))
    optimizer = build_optimizer(model, config)
    loader = BatchLoader(TokenStream(trainer.data, "train"), batch_size=8, seq_len=16, shuffle_seed=0)

    def closure(batch):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        return loss

    for step in steps:
        optimizer.step(functools.partial(closure, loader.batch(step)))
    optimizer.flush()
    loader.close()
    return model.state_dict()


def assert_close(weights: dict[str, np.ndarray], right: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == right.keys()
    for name, value in right.items():
        assert abs(weights[name] - value.numpy()).max() <= 1e-10 * value.abs().max(), name


@pytest.mark.parametrize("options, ranks", [(MVR2, 1), (MVR3, 2)])
def test_a_skipped_second_pass_restarts_the_momentum(trainer, options, ranks):  # noqa: F811
    """By then the update of the step before is applied. The next gradient starts a new momentum."""
    name = f"second-pass-{options.split()[1]}-{ranks}"
    patch = functools.partial(poison, 4, "loss", passes=(2,), rank=ranks - 1)
    whole = trainer.run(name, f"{options} --on-nan skip", ranks=ranks, patch=patch).ok()
    losses = {line["update"]: line for line in whole.metrics if "train_loss" in line}
    # Step 4 applies the update of step 3 and logs nothing. Step 5 is at X_4, with one pass, and step 6 at X_5.
    assert list(losses) == [0, 1, 2, 3, 4, 5]
    assert [line["passes"] for line in losses.values()] == [1, 3, 5, 7, 10, 12]
    assert whole.metrics[-1]["update"] == 6 and whole.metrics[-1]["skipped"] == 1
    four = trainer.run(f"{name}-four", f"{options} --steps 4", ranks=ranks).ok()
    assert_close(whole.weights, fresh_optimizer(trainer, options, four.folder, steps=(5, 6)))
    trainer.run(f"{name}-5", f"{options} --on-nan skip --steps 5", ranks=ranks, patch=patch).ok()
    trainer.run(f"{name}-5", f"{options} --on-nan skip --resume auto", ranks=ranks).ok().same_as(whole)


def test_a_run_that_can_only_skip_ends(trainer):  # noqa: F811
    patch = functools.partial(poison, 2, "loss", last=99)
    message = trainer.run("only-skips", "--on-nan skip --steps 40", patch=patch).refusal()
    assert "step 22: " in message and "as in the 20 steps before" in message


class Arrived:
    """In place of a CUDA event."""

    def synchronize(self) -> None:
        pass


def test_on_cuda_flags_are_read_a_step_later_but_before_anything_is_written(monkeypatch):
    """Tests the order of events on a CPU, with a stub for the copy to the host."""

    def send(self: FiniteGuard) -> None:
        self._in_flight = self._step, self._flags.clone(), Arrived()

    monkeypatch.setattr(FiniteGuard, "_send", send)
    model = torch.nn.Linear(2, 2)

    def guard() -> FiniteGuard:
        made = FiniteGuard(model, torch.optim.SGD(model.parameters()), Ranks(0, 1, torch.device("cpu")), Config(batch_size=8))
        made._later = True
        return made

    def one_step(watching: FiniteGuard, number: int, value: float) -> None:
        with watching.step(number):
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            watching.look(torch.tensor(1.0))

    watching = guard()
    one_step(watching, 0, 1.0)
    one_step(watching, 1, torch.nan)  # not read yet
    with pytest.raises(Diverged, match="step 1: the gradient of bias is not finite"):
        one_step(watching, 2, 1.0)
    for write in (FiniteGuard.check, FiniteGuard.check_state):
        watching = guard()
        one_step(watching, 0, torch.inf)
        with pytest.raises(Diverged, match="step 0: the gradient of bias is not finite"):
            write(watching)
