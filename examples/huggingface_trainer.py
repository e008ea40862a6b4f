"""Hugging Face's `Trainer` with Gluon and SingleBatchMVR, through `optimizers=`.

    pip install transformers accelerate
    python examples/huggingface_trainer.py                                or: accelerate launch, torchrun

The Trainer accumulates gradients itself and then calls a bare `step()`, which is all that Gluon and SingleBatchMVR need. It
cannot evaluate a batch twice, so the variants with two passes raise a TypeError. Use the loop of accelerate_loop.py for them.
Under DDP each rank keeps a share of the momentum, and the Trainer saves the first rank's `state_dict()`, which raises a
RuntimeError. `WholeStateTrainer` saves `full_state_dict()` instead, which resumes on any number of ranks.
"""

import os
import tempfile
from typing import Any

from task import MICRO, ONE_PASS, ROWS, STEPS, Net, batch, build, finish, leave
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments


class Samples(Dataset):
    """The samples of all steps, one after the other."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = batch(index // ROWS)
        return {"x": x[index % ROWS], "y": y[index % ROWS]}


class WithLoss(nn.Module):
    """A model as the Trainer expects it: its output holds the loss."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.net(x, y)}


class WholeStateTrainer(Trainer):
    """Saves the whole momentum, from every rank."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        whole = self.optimizer.optimizer.full_state_dict()  # a collective, and only the first rank saves
        self.optimizer.state_dict = lambda: whole
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            del self.optimizer.state_dict


def train(variant: str, folder: str, resume: str | None = None, **arguments: Any) -> tuple[list[float], list[Tensor]]:
    """The losses as the Trainer logs them, and the final weights."""
    model = WithLoss(Net())
    usual = {
        "lr_scheduler_type": "constant",  # the Trainer's default decays linearly to 0, from the optimizer's own lr
        "max_grad_norm": 0.0,  # the default clips; the size of a step does not depend on the gradient's anyway
        **{"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True},
        **arguments,
    }
    settings = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=MICRO // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=ROWS // MICRO,
        train_sampling_strategy="sequential",
        **usual,
    )
    optimizer = build(variant, model)
    trainer = WholeStateTrainer(model, settings, train_dataset=Samples(), optimizers=(optimizer, None))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return losses, [p.detach() for p in model.parameters()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        runs = {variant: train(variant, folder) for variant in ONE_PASS}
    if int(os.environ.get("RANK", "0")) == 0:
        finish(runs)
    leave()
