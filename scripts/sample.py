"""Draw text from a trained model.

    python -m scripts.sample runs/gluon_b512 --prompt "The union of these States"
    python -m scripts.sample runs/quickstart_*                        from the run with the lowest loss, without a prompt
    python -m scripts.sample runs/gluon_b512/checkpoints/step_0001000 --temperature 0.7 --top-p 0.9

Each token is computed once, because the keys and values of earlier tokens are kept.
"""

import codecs
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.errors import Parser, UserError, one_line_errors
from data.tokenize_text import load_encoder
from model import GPT, Cache
from reading.runs import read_run
from reading.trained import load_trained
from training.devices import choose_device


@torch.no_grad()
def generate(model: GPT, tokens: list[int], count: int, choose: Callable[[Tensor], int]) -> Iterator[int]:
    """Generate `count` tokens that follow `tokens` (at least one, at most seq_len), each chosen from its logits (V,).

    When seq_len tokens have been read, the model forgets the older half and reads the newer half again.
    """
    device, most = model.embedding.weight.device, model.config.seq_len
    cache, tokens, unread = Cache(model.config), list(tokens), list(tokens)
    for _ in range(count):
        if cache.length + len(unread) > most:
            cache, unread = Cache(model.config), tokens[-max(1, most // 2) :]
        logits = model(torch.tensor([unread], device=device), cache=cache)[0, -1]
        unread = [choose(logits)]
        tokens += unread
        yield unread[0]


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The probabilities (V,) that the next token is drawn with, from its logits (V,).

    Temperature 0 always takes the likeliest token. `top_k` > 0 keeps the k likeliest. `top_p` < 1 then keeps the smallest
    set of likeliest tokens with at least that total probability (nucleus sampling: Holtzman et al., "The Curious Case of
    Neural Text Degeneration", section 3.1).
    """
    logits = logits.double()
    if temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    ordered, index = torch.softmax(logits / temperature, 0).sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
        ordered /= ordered.sum()
    ordered[ordered.cumsum(0) - ordered >= top_p] = 0
    return torch.zeros_like(ordered).scatter_(0, index, ordered / ordered.sum())


def sampler(vocabulary: int, temperature: float, top_k: int, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """A function that draws a token below `vocabulary` from logits (a model may have more outputs than tokens)."""
    generator = torch.Generator().manual_seed(seed)  # on the host, so that every device draws the same tokens

    def choose(logits: Tensor) -> int:
        drawn_with = probabilities(logits[:vocabulary].cpu(), temperature, top_k, top_p)
        return int(torch.multinomial(drawn_with, 1, generator=generator))

    return choose


def best_run(runs: list[Path]) -> Path:
    """The run with the lowest last validation loss; a single run without looking at it. Raises UserError if none has one."""
    if len(runs) == 1:
        return runs[0]
    losses = {}
    for run in runs:
        validations = read_run(run).finite()
        losses[run] = validations[-1]["val_loss"] if validations else math.inf
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        raise UserError(f"none of the {len(runs)} runs has a finite val_loss yet; name the one to sample from")
    print(f"{best}: validation loss {losses[best]:.4f}, the lowest of {len(runs)} runs\n", file=sys.stderr)
    return best


def main(argv: list[str]) -> None:
    """Load, draw, print."""
    parser = Parser(prog="sample", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a run's folder, a checkpoint or a model.safetensors; or several "
        "runs' folders, to take the best",
    )  # fmt: skip
    parser.add_argument("--prompt", default="", help="start of the text (default: nothing)")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to draw (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all (the default)")
    parser.add_argument("--top-p", type=float, default=0.95, help="total probability of the tokens kept (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu", "mps"))
    arguments = parser.parse_args(argv)
    for name, fine, wanted in (
        ("tokens", arguments.tokens >= 1, "at least 1"),
        ("temperature", 0 <= arguments.temperature < math.inf, "a number of at least 0"),
        ("top-k", arguments.top_k >= 0, "at least 0"),
        ("top-p", 0 < arguments.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= arguments.seed < 2**63, "at least 0 and below 2**63"),
    ):
        if not fine:
            raise UserError(f"--{name} must be {wanted}, not {getattr(arguments, name.replace('-', '_'))}")
    try:
        arguments.prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not UTF-8 text, so the vocabulary has no tokens for it; write it in UTF-8") from None

    trained = load_trained(best_run(arguments.models), choose_device(arguments.device))
    encoder, most = load_encoder(trained.encoding), trained.model.config.seq_len
    tokens = [encoder.end_of_text]  # it precedes every document in training
    if arguments.prompt:
        tokens += next(iter(encoder.encode([arguments.prompt]))).tolist()
    if len(tokens) > most:
        raise UserError(f"--prompt has {len(tokens) - 1:,} tokens, and the model reads at most {most - 1:,}; shorten it")
    choose = sampler(encoder.vocab_size, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may need several tokens
    print(arguments.prompt, end="", flush=True)
    for token in generate(trained.model, tokens, arguments.tokens, choose):
        if token == encoder.end_of_text:
            break
        print(text.decode(encoder.decode(token)), end="", flush=True)
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    with one_line_errors("sample"):
        main(sys.argv[1:])
