"""Whole runs on a device that is not there: what Apple's GPUs lack, and what makes a host wait for an NVIDIA GPU.

A CPU plays the device (tests/helpers/pretended.py), so every number must be that of a run on the CPU.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_gpt
from common.errors import UserError
from data.loader import BatchLoader
from tests.helpers.pretended import Pretended, be_a_rank_with_a_gpu, pretended
from tests.helpers.train_runs import TINY, data, trainer  # noqa: F401
from training import numerics
from training.config import Config, load_config
from training.finite import FiniteGuard
from training.ranks import Ranks

OPTIMIZERS = [
    "gluon", "mvr1", "mvr3 --momentum 0.2", "mvr2 --block-norm colnorm --embed-norm rownorm", "adamw", "single_batch",
    "muon_mvr --compare-with previous_weights", "muon_mvr --compare-with previous_batch", "torch.optim:AdamW",
    "torch.optim:Muon",
]  # fmt: skip
QUIET = "--val-every 100 --log-every 100 --checkpoint-every 0"


class Here:
    """Runs in a folder."""

    def __init__(self, folder: Path, data: Path) -> None:  # noqa: F811
        self._options = TINY | {
            "--device": "auto", "--dtype": "float32", "--n-layer": "1", "--micro-batch-size": "4", "--val-every": "2",
            "--results-dir": str(folder), "--data-dir": str(data), "--steps": "5",
        }  # fmt: skip
        self._options["--compile"] = "off"

    def run(self, name: str, more: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
        """The weights and the losses of a run."""
        given = more.split()
        defaults = {flag: value for flag, value in (self._options | {"--run-name": name}).items() if flag not in given}
        folder = train_gpt.train(load_config([word for pair in defaults.items() for word in pair] + given))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [{key: line[key] for key in line if key.endswith("loss") or key in ("update", "skipped")} for line in lines]
        return load_file(folder / "model.safetensors"), losses


@pytest.fixture
def here(tmp_path, data) -> Here:  # noqa: F811
    return Here(tmp_path, data)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mps", "cuda"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_and_its_resume_are_those_of_the_cpu(here, optimizer, kind):
    """Data, passes, steps, validation, checkpoint and resume: no tensor is on the wrong device or of a dtype that it lacks."""
    right, losses = here.run("cpu", f"--device cpu --optimizer {optimizer}")
    with pretended(kind) as device:
        here.run("device", f"--optimizer {optimizer} --steps 3 --checkpoint-every 2")
        weights, found = here.run("device", f"--optimizer {optimizer} --resume auto")
    assert any("checkpoint.py" in wait for wait in device.waits)
    assert same(weights, right)
    values = {(line["update"], name): line[name] for line in losses for name in line}
    for line in found:
        for name, value in line.items():
            assert values.get((line["update"], name), value) == value
    assert found[-1] == losses[-1] and "val_loss" in found[-1]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["mvr2 --embed-norm rownorm", "muon_mvr --compare-with previous_weights"])
def test_two_ranks_with_a_card_each_are_two_on_the_cpu(trainer, optimizer):  # noqa: F811
    """Gradients, losses, directions, flags, checkpoints: what travels between cards is on them, and the rest on the hosts."""
    options, name = f"--dtype float32 --compile off --optimizer {optimizer}", optimizer.split()[0]
    right = trainer.run(f"{name}-cpu", options, ranks=2).ok()
    device = {"ranks": 2, "patch": be_a_rank_with_a_gpu}
    trainer.run(f"{name}-cuda", f"{options} --device cuda --steps 4", **device).ok()
    found = trainer.run(f"{name}-cuda", f"{options} --device cuda --resume auto", **device).ok()
    found.same_as(right)


def waits_of_steps(monkeypatch, device: Pretended) -> dict[int, list[str]]:
    """Collects where the host waits for the device between the batch of a step and that of the next."""
    waits, batch = {}, BatchLoader.batch

    def watched(self, step):
        waits[step - 1] = list(device.waits)
        device.waits.clear()
        return batch(self, step)

    monkeypatch.setattr(BatchLoader, "batch", watched)
    return waits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loop_waits_for_a_gpu_once_a_step_for_the_step_before(here, monkeypatch, optimizer):
    """It reads the flags of the step before, which have arrived when a step is queued."""
    with pretended("cuda") as device:
        waits = waits_of_steps(monkeypatch, device)
        here.run("quiet", f"--optimizer {optimizer} {QUIET} --steps 6")
    for step in (2, 3, 4):  # the flags of step 0 are read when its loss is written
        (wait,) = waits[step]
        assert wait.startswith("event at ") and "finite.py" in wait


def test_a_host_read_in_the_loop_is_found(here, monkeypatch):
    look = FiniteGuard.look
    monkeypatch.setattr(FiniteGuard, "look", lambda self, loss: (math.isfinite(loss), look(self, loss))[1])
    with pretended("cuda") as device:
        waits = waits_of_steps(monkeypatch, device)
        here.run("reads", f"--optimizer gluon {QUIET}")
    assert "aten._local_scalar_dense at " in waits[2][0] and len(waits[2]) == 2


@pytest.mark.parametrize("kind", ["mps", "cuda"])
def test_a_skipped_step(here, monkeypatch, kind):
    look = FiniteGuard.look
    monkeypatch.setattr(FiniteGuard, "look", lambda self, loss: look(self, loss * math.nan if self._step == 2 else loss))
    right, losses = here.run("cpu", "--device cpu --optimizer mvr2 --on-nan skip")
    with pretended(kind):
        weights, found = here.run("device", "--optimizer mvr2 --on-nan skip")
    assert same(weights, right) and found == losses and found[-1]["skipped"] == 1


def test_what_the_pretended_device_refuses_and_notes():
    with pretended("mps"):
        here = torch.ones(2, device="mps")
        for act in (here.double, lambda: torch.linalg.vector_norm(here, dtype=torch.float64), lambda: here.to(torch.float64)):
            with pytest.raises(AssertionError, match=r"mps has no torch.float64"):
                act()
        with pytest.raises(AssertionError, match="only CUDA has pinned memory"):
            torch.empty(2, pin_memory=True)
    with pretended("cuda") as device:
        here = torch.ones(2, device="cuda") * 2
        assert here.device == torch.device("cuda", 0) and not device.waits
        with pytest.raises(AssertionError, match="two devices"):
            here + torch.ones(2)
        acts = (here.sum().item, here.cpu, here.tolist, lambda: bool(here.any()), lambda: here[here > 1], here.nonzero)
        for number, act in enumerate(acts, 1):
            act()
            assert len(device.waits) == number


def test_what_an_apple_gpu_can_not_do_is_refused(monkeypatch):
    with pytest.raises(UserError, match="Apple's GPUs have no float64; use --dtype float32"):
        numerics.choose_dtype(Config(dtype="float64"), torch.device("mps"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pretended("mps"), pytest.raises(UserError, match="several ranks can't share an Apple GPU; start one, or use --device"):
        Ranks.start("auto", 1)
