"""The data, model and optimizer of a run, built as train_gpt.py builds them, for studies that look inside."""

import torch

from data import sotu
from data.loader import BatchLoader, TokenStream
from data.shards import list_shards
from model import GPT, GPTConfig
from training.config import Config
from training.optimizers import build_optimizer, is_deferred, optimizer_class


def evaluations(optimizer: str, updates: int) -> int:
    """The gradient evaluations of a run. The first step of a deferred optimizer has no previous weights, so it takes one."""
    kind = optimizer_class(optimizer)
    return getattr(kind, "passes", 1) * updates - (is_deferred(kind) and updates > 0)


def build(config: Config, device: torch.device | str = "cpu") -> tuple[GPT, torch.optim.Optimizer]:
    """Model and optimizer, seeded. The model is float32, or float64 if the config says so."""
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig(config.vocab_size, config.n_layer, config.n_head, config.d_model, config.seq_len))
    model.to(device, torch.float64 if config.dtype == "float64" else torch.float32)
    return model, build_optimizer(model, config)


def batches(config: Config, device: torch.device | str = "cpu") -> BatchLoader:
    """The stream of training batches. Prepares the embedded text if the config asks for it."""
    if config.text and not list_shards(config.data_dir):
        sotu.prepare(config.data_dir)
    return BatchLoader(
        TokenStream(config.data_dir, "train"), batch_size=config.batch_size, seq_len=config.seq_len, device=device,
        vocab_size=config.vocab_size, shuffle_seed=config.seed if config.shuffle else None,
    )  # fmt: skip
