"""One of two ranks that train with the examples' frameworks. The first saves the weights that they find: FOLDER/found.pt."""

import sys
from pathlib import Path

import torch

from tests.optim import test_frameworks as tests

import accelerate_loop  # isort: skip  (tests.optim.test_examples makes the examples' folder importable)
import huggingface_trainer
import lightning_module
import task
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import ModelCheckpoint


def with_trainer(variant: str, folder: Path) -> dict:
    options = {"max_grad_norm": tests.CLIP, "lr_scheduler_type": "linear"}
    saving = {"save_strategy": "steps", "save_steps": tests.HALF}
    _, weights = huggingface_trainer.train(variant, str(folder), **options, **saving)
    _, resumed = huggingface_trainer.train(variant, str(folder), str(folder / f"checkpoint-{tests.HALF}"), **options)
    return {"weights": weights, "resumed": resumed}


def with_accelerate(variant: str, folder: Path) -> dict:
    file = str(folder / "half.pt")
    _, weights = accelerate_loop.train(variant, save_to=file)
    _, resumed = accelerate_loop.train(variant, resume=file)
    return {"weights": weights, "resumed": resumed}


def what_save_state_says(folder: Path) -> str:
    accelerator = Accelerator(cpu=True)
    net = task.Net()
    accelerator.prepare(net, task.build("gluon", net))
    try:
        accelerator.save_state(str(folder))
    except RuntimeError as error:
        return str(error)
    return ""


def with_accelerates_fsdp2(variant: str) -> dict:
    """`prepare` shards the model and replaces the parameters in the optimizer's groups. It does so on accelerators alone."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = "FSDP"
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="no_wrap", cpu_ram_efficient_loading=False
    )
    net = task.Net()
    optimizer = task.build(variant, net)
    old = list(net.parameters())
    model, prepared = accelerator.prepare(net, optimizer)
    for step in range(task.STEPS):
        x, y = (whole.chunk(2)[accelerator.process_index] for whole in task.batch(step))

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            prepared.zero_grad()
            accelerator.backward(loss := model(x, y))
            return loss.detach()

        prepared.step(closure)
    optimizer.flush()
    assert not any(p in optimizer.state for p in old)
    AcceleratorState._reset_state(reset_partial_state=False)
    return {"weights": [p.detach().full_tensor() for p in model.parameters()]}


def with_lightning(kind: str, variant: str, folder: Path) -> dict:
    options = {"max_epochs": 2, "strategy": "ddp"} | ({"gradient_clip_val": tests.CLIP} if kind == "Automatic" else {})
    rows = (task.MICRO if kind == "Manual" else task.ROWS) // 2
    saving = ModelCheckpoint(str(folder), "{epoch}", save_top_k=-1)
    modules = [tests.with_schedule(getattr(lightning_module, kind))(variant) for _ in range(2)]
    lightning_module.fit(modules[0], rows, enable_checkpointing=True, callbacks=[saving], **options)
    lightning_module.fit(modules[1], rows, resume=str(folder / "epoch=0.ckpt"), **options)
    return dict(zip(("weights", "resumed"), ([p.detach() for p in m.net.parameters()] for m in modules), strict=True))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {"accelerate mvr3": with_accelerate("mvr3", folder), "save_state": what_save_state_says(folder / "state")}
    found |= {f"fsdp2 {variant}": with_accelerates_fsdp2(variant) for variant in ("gluon", "mvr3", "previous_batch")}
    found["trainer single_batch"] = with_trainer("single_batch", folder / "trainer")
    found["manual mvr2"] = with_lightning("Manual", "mvr2", folder / "manual")
    found["automatic gluon"] = with_lightning("Automatic", "gluon", folder / "automatic")
    if accelerate_loop.PartialState().is_main_process:
        torch.save(found, folder / "found.pt")
    task.leave()
