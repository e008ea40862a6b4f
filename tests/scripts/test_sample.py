"""Text from a trained model: the cache, the draws, the command, and its errors."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from scripts.sample import generate, main, probabilities, sampler
from tests.helpers.trained import random_model, write_run

ROOT = Path(__file__).resolve().parents[2]


def greedy(logits):
    return int(logits.argmax())


def test_the_cache_changes_nothing():
    model = random_model(seq_len=24).double()
    most, tokens = 24, [256, 5]
    drawn = list(generate(model, tokens, 60, greedy))
    start = 0
    for token in drawn:  # compute the full window again at every token
        if len(tokens) - start > most:
            start = len(tokens) - most // 2
        with torch.no_grad():
            assert greedy(model(torch.tensor([tokens[start:]]))[0, -1]) == token
        tokens.append(token)
    assert len(set(drawn)) > 5  # any cache would be right on a text of one letter


def test_each_token_is_read_once():
    model = random_model()
    read = []
    model.embedding.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0].numel()))
    list(generate(model, [1, 2, 3], 10, greedy))
    assert read == [3] + [1] * 9


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=30), st.floats(0.1, 3), st.integers(0, 31), st.floats(0.01, 1))
@settings(deadline=None)
def test_probabilities(logits, temperature, top_k, top_p):
    logits = torch.tensor(logits, dtype=torch.float64)
    plain = torch.softmax(logits / temperature, 0)
    assert torch.allclose(probabilities(logits, temperature), plain)
    drawn = probabilities(logits, temperature, top_k, top_p)
    kept = drawn > 0
    assert math.isclose(drawn.sum(), 1) and torch.allclose(drawn[kept], plain[kept] / plain[kept].sum())
    assert 1 <= kept.sum() <= (top_k or len(logits))
    assert plain[kept].min() >= plain[~kept].max() if not kept.all() else True
    within = plain.sort(descending=True)[0][: top_k or None]
    within = within / within.sum()
    count = int(kept.sum())
    assert within[:count].sum() >= top_p - 1e-9  # enough of them, and one fewer would not be
    assert count == 1 or within[: count - 1].sum() < top_p + 1e-9


def test_temperature_zero_takes_the_likeliest():
    assert probabilities(torch.tensor([1.0, 3.0, 2.0]), temperature=0).tolist() == [0, 1, 0]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.0, 1.0, 2.0, 50.0])  # the last is not a token
    choose = sampler(3, 1.0, 0, 1.0, seed=1)
    counts = torch.bincount(torch.tensor([choose(logits) for _ in range(4000)]), minlength=4) / 4000
    assert counts[3] == 0 and torch.allclose(counts[:3], torch.softmax(logits[:3], 0).float(), atol=0.03)


def said(capsys, *words):
    main([*map(str, words), "--device", "cpu"])
    return capsys.readouterr().out


def test_run_checkpoint_and_weights_give_the_same_text(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    text = said(capsys, run, "--prompt", "Größe", "--seed", "3")
    assert text.startswith("Größe") and len(text) > 50
    assert text == said(capsys, run, "--prompt", "Größe", "--seed", "3")
    assert text != said(capsys, run, "--prompt", "Größe", "--seed", "4")
    checkpoint = run / "checkpoints" / "step_0000007"
    checkpoint.mkdir(parents=True)
    shutil.move(run / "model.safetensors", checkpoint)
    (checkpoint / "state.json").write_text(json.dumps({"config": json.loads((run / "config.json").read_text())}))
    for path in (run, checkpoint, checkpoint / "model.safetensors"):
        assert said(capsys, path, "--prompt", "Größe", "--seed", "3") == text


def test_gpt2_vocabulary(tmp_path, capsys):
    run = write_run(tmp_path / "run", vocab_size=50304)
    text = said(capsys, run, "--prompt", "hello world", "--tokens", "40", "--top-p", "1", "--temperature", "2")
    assert text.startswith("hello world") and len(text) > 60


def test_the_best_of_several_runs(tmp_path, capsys):
    runs = [write_run(tmp_path / str(i), seed=i, val_loss=loss) for i, loss in enumerate((2.0, 1.5, math.nan))]
    main([*map(str, runs), "--device", "cpu"])
    best = capsys.readouterr()
    assert best.err.startswith(f"{runs[1]}: validation loss 1.5000, the lowest of 3 runs")
    assert best.out == said(capsys, runs[1])


def damaged(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return run


def other_model(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"d_model": 64}))
    return run


def without(name):
    def remove(run):
        (run / name).unlink()
        return run

    return remove


def other_config(run):
    (run / "config.json").write_text('{"hidden_size": 3}')
    return run


@pytest.mark.parametrize(
    "change, words, expected",
    [
        (lambda run: run / "nowhere", "", "there is no such run or checkpoint"),
        (lambda run: run / "metrics.jsonl", "", "is not a .safetensors file"),
        (without("model.safetensors"), "", "holds no model.safetensors and no checkpoint"),
        (without("config.json"), "", "has no config.json or state.json next to it"),
        (damaged, "", "the file is damaged"),
        (other_model, "", "belongs to another model"),
        (other_config, "", "it belongs to another model"),
        (None, "--tokens 0", "--tokens must be at least 1, not 0"),
        (None, "--temperature -1", "--temperature must be a number"),
        (None, "--temperature nan", "--temperature must be a number"),
        (None, "--top-p 0", "--top-p must be above 0"),
        (None, "--top-k -1", "--top-k must be at least 0"),
        (None, "--prompt " + "long" * 10, "--prompt has 40 tokens, and the model reads at most 31"),
        (None, "--prompt \udce4", "--prompt is not UTF-8 text"),
        (None, "--colour red", "unrecognized arguments"),
    ],
)
def test_what_is_refused(tmp_path, change, words, expected):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match=expected) as caught:
        main([str(change(run) if change else run), *words.split(" ")] if words else [str(change(run))])
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_vocabulary(tmp_path):
    with pytest.raises(UserError, match="is neither GPT-2's nor bytes"):
        main([str(write_run(tmp_path / "run", vocab_size=61))])


@pytest.mark.slow
def test_as_a_command(tmp_path):
    ended = subprocess.run([sys.executable, "-m", "scripts.sample", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "") and ended.stderr.startswith("sample: nowhere: there is no such run")
    assert len(ended.stderr.splitlines()) == 1
