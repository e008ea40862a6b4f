"""Every example runs and trains exactly as the plain loop does. What a framework cannot do raises a clear error."""

import contextlib
import importlib
import io
import itertools
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.func import functional_call

from tests.helpers import forked
from tests.helpers.reference import trajectory
from tests.helpers.train_runs import free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import plain_pytorch
import task

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = tuple(task.OPTIMIZERS)
FLOAT32 = 1e-6  # the Trainer logs its losses in float32; the weights are float64


@pytest.fixture(scope="module")
def plain():
    return {variant: plain_pytorch.train(variant) for variant in VARIANTS}


def framework(package: str, script: str):
    """The module of a script. Skips the test if its framework is not installed."""
    pytest.importorskip(package, reason=f"{package} is a test dependency (requirements-dev.txt) and is not installed")
    return importlib.import_module(script)


def assert_same(run, expected, losses=1e-12):
    assert len(run[0]) == len(expected[0]) == task.STEPS
    assert run[0] == pytest.approx(expected[0], rel=losses)
    for ours, theirs in zip(run[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def assert_differ(run, expected):
    assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(run[1], expected[1], strict=True))


# ---- the plain loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_loop_is_the_recursion(variant):
    net = task.Net()
    names = [name for name, _ in net.named_parameters()]

    def gradient(weights, step, old=False):
        weights = {name: w.detach().requires_grad_() for name, w in zip(names, weights, strict=True)}
        return list(torch.autograd.grad(functional_call(net, weights, task.batch(step)), list(weights.values())))

    norms, own = ["sign" if "head" in n else "rms" if "bias" in n else "spectral" for n in names], task.OPTIMIZERS[variant][1]
    path = trajectory(
        variant, list(net.parameters()), gradient, range(task.STEPS), norms,
        [2.0 if n == "sign" else 1.0 for n in norms], lambda _: 0.05, lambda _: 0.9,
        lambda _: own.get("gamma", 0.0), q=lambda _: own.get("q", 1.0),
    )  # fmt: skip
    _, weights = plain_pytorch.train(variant, polar="svd")
    for ours, theirs in zip(weights, path[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def loss_of(weights):
    """The mean loss over batches that no run trains on."""
    net = task.Net()
    for p, w in zip(net.parameters(), weights, strict=True):
        p.copy_(w)
    return sum(net(*task.batch(step)).item() for step in range(100, 120)) / 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_falls(plain, variant):
    assert loss_of(plain[variant][1]) < 0.7 * loss_of(task.Net().parameters())


def test_variants_differ(plain):
    for variant, other in itertools.combinations(VARIANTS, 2):
        assert_differ(plain[variant], plain[other])


@pytest.mark.parametrize("variant", task.ONE_PASS)
def test_bare_step(plain, variant):
    assert_same(plain_pytorch.train_with_bare_step(variant), plain[variant], losses=0)


@pytest.mark.parametrize("variant", task.TWO_PASSES)
def test_bare_step_is_refused(variant):
    with pytest.raises(TypeError, match="needs a closure"):
        plain_pytorch.train_with_bare_step(variant)


# ---- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", task.ONE_PASS)
def test_trainer(plain, variant, tmp_path):
    trainer = framework("transformers", "huggingface_trainer")
    assert_same(trainer.train(variant, str(tmp_path)), plain[variant], FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("variant", task.TWO_PASSES)
def test_trainer_refuses_two_passes(variant, tmp_path):
    trainer = framework("transformers", "huggingface_trainer")
    with pytest.raises(TypeError, match="needs a closure"):
        trainer.train(variant, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerate(plain, variant):
    loop = framework("accelerate", "accelerate_loop")
    assert_same(loop.train(variant), plain[variant])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_accelerates_own_step_takes_the_closure(plain, variant):
    loop = framework("accelerate", "accelerate_loop")
    accelerator = loop.Accelerator(cpu=True)
    net = task.Net()
    model = accelerator.prepare_model(net)
    optimizer = accelerator.prepare_optimizer(task.build(variant, net))
    losses = []
    for step in range(task.STEPS):
        seen = []

        def closure(step=step, seen=seen):
            optimizer.zero_grad()
            loss = model(*task.batch(step))
            accelerator.backward(loss)
            seen.append(loss.item())

        optimizer.step(closure)
        losses.append(seen[0 if variant == "previous_batch" else -1])
    optimizer.optimizer.flush()
    assert_same((losses, list(net.parameters())), plain[variant])


# ---- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_manual(plain, variant):
    script = framework("lightning", "lightning_module")
    module = script.Manual(variant)
    trainer = script.fit(module)
    assert_same((module.losses, list(module.net.parameters())), plain[variant])
    assert trainer.global_step == task.STEPS


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_automatic(plain, variant):
    script = framework("lightning", "lightning_module")
    module = script.Automatic(variant)
    trainer = script.fit(module, task.ROWS)
    kind = task.OPTIMIZERS[variant][0]
    assert len(module.losses) == kind.passes * task.STEPS - kind.deferred
    losses = module.losses
    if kind.passes == 2:  # the loss of the pass at the weights of the step
        losses = losses[:1] + losses[2::2] if kind.deferred else losses[::2]
    assert_same((losses, list(module.net.parameters())), plain[variant])
    assert trainer.global_step == task.STEPS


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gluon", "mvr2"])
def test_lightning_automatic_accumulation_is_refused(variant):
    script = framework("lightning", "lightning_module")
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        script.fit(script.Automatic(variant), accumulate_grad_batches=2)


@pytest.mark.slow
@pytest.mark.parametrize("variant", task.TWO_PASSES)
def test_lightning_bare_step_is_refused(variant):
    script = framework("lightning", "lightning_module")

    class Bare(script.Manual):
        def training_step(self, micro_batch, index):
            self.manual_backward(self.net(*micro_batch))
            self.optimizers().step()

    with pytest.raises(RuntimeError, match="left no gradient"):
        script.fit(Bare(variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_lightning_resumes_exactly(plain, variant, tmp_path):
    script = framework("lightning", "lightning_module")
    half, kept = task.STEPS // 2, {}

    class Interrupted(script.Manual):
        def training_step(self, micro_batch, index):
            super().training_step(micro_batch, index)
            if self.global_step == half and not kept and not self.waiting:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")
                kept.update(weights=[p.detach().clone() for p in self.net.parameters()])

    script.fit(Interrupted(variant))
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    module = script.Manual(variant)
    module.load_state_dict(saved["state_dict"])
    assert all(torch.equal(p, w) for p, w in zip(module.net.parameters(), kept["weights"], strict=True))
    optimizer = task.build(variant, module.net)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    losses = []
    for step in range(half, task.STEPS):

        def closure(step=step):
            optimizer.zero_grad()
            loss = module.net(*task.batch(step))
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    optimizer.flush()
    assert_same((plain[variant][0][:half] + losses, list(module.net.parameters())), plain[variant])


# ---- several processes, and every script from the command line --------------------------------------------------------


def run_script(script, save, processes):
    """What a script prints. A script for one process runs in this one; others are started as torchrun would."""
    path = ROOT / "examples" / f"{script}.py"
    if processes == 1:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), mock.patch.object(sys, "argv", [str(path), "--save", str(save)]):
            runpy.run_path(str(path), run_name="__main__")
        return printed.getvalue()
    meeting = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "tests/helpers/shutdown.py"), str(path), "--save", str(save)]
    ranks = [
        forked.Popen(command, ROOT.parent, {**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    printed, errors = zip(*(rank.communicate() for rank in ranks), strict=True)
    assert [rank.returncode for rank in ranks] == [0] * processes, "".join(errors)[-3000:]
    return "".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "processes", "package", "variants"),
    [
        ("plain_pytorch", 1, "torch", VARIANTS),
        ("huggingface_trainer", 1, "transformers", task.ONE_PASS),
        ("accelerate_loop", 2, "accelerate", task.TWO_PASSES),
        ("lightning_module", 1, "lightning", VARIANTS),
        ("ddp", 2, "torch", VARIANTS),
        ("fsdp2", 2, "torch", VARIANTS),
    ],
)
def test_script(plain, script, processes, package, variants, tmp_path):
    pytest.importorskip(package, reason=f"{package} is a test dependency (requirements-dev.txt) and is not installed")
    printed = run_script(script, tmp_path / "runs.pt", processes)
    runs = torch.load(tmp_path / "runs.pt")
    assert set(runs) == set(variants)
    for variant in variants:
        assert_same(runs[variant], plain[variant], FLOAT32 if script == "huggingface_trainer" else 1e-12)
        assert f"{variant}: loss" in printed
    if script == "ddp":
        kinds = {name: kind for name, (kind, _) in task.OPTIMIZERS.items()}
        reductions = {name: kind.passes * task.STEPS - kind.deferred for name, kind in kinds.items()}
        assert str(reductions) in printed, "every pass reduces once"
    if script == "fsdp2":
        assert "is refused: the closure left no gradient" in printed
