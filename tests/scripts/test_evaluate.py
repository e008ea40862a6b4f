"""Loss, perplexity and bits per byte: against sums over single tokens, on shards and text, and the errors."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.shards import Manifest, shard_info, write_manifest, write_shard
from data.tokenize_text import load_encoder, tokenize_documents
from reading.trained import load_trained
from scripts.evaluate import Score, main
from tests.helpers.trained import random_model, write_run

TEXT = "Größe, and a line.\nAnother one with ten words in it, or so.\n"  # 62 bytes


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def table(capsys, *words):
    """The rows of the printed table as dictionaries."""
    main([*map(str, words), "--device", "cpu"])
    head, *lines = capsys.readouterr().out.splitlines()
    return [dict(zip(head.split(), line.split(), strict=True)) for line in lines]


def nats(model, tokens):
    """The losses of all tokens but the first, computed one at a time from the earlier tokens of a window of 32."""
    losses = []
    for i in range(1, len(tokens)):
        start = (i - 1) // 32 * 32
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:i]]))[0, -1]
        losses.append(-torch.log_softmax(logits, 0)[tokens[i]].item())
    return losses


def test_text_of_bytes(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    tokens = [256, *TEXT.encode()]
    losses = nats(random_model(), tokens)
    [row] = table(capsys, run, "--data", tmp_path / "a.txt")
    assert row["model"] == "run" and row["tokens"] == str(len(losses)) == "62"
    assert float(row["loss"]) == pytest.approx(np.mean(losses), abs=6e-5)
    assert float(row["perplexity"].replace(",", "")) == pytest.approx(math.exp(np.mean(losses)), abs=6e-3)
    assert float(row["bits/byte"]) == pytest.approx(sum(losses) / math.log(2) / 62, abs=6e-5)


def test_several_documents_of_gpt2_tokens(tmp_path, capsys):
    run = write_run(tmp_path / "run", vocab_size=50304)
    texts = [TEXT, "A second document.\n"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokens = [token for ids in load_encoder("gpt2").encode(texts) for token in (50256, *map(int, ids))]
    losses = nats(random_model(vocab_size=50304), tokens)
    [row] = table(capsys, run, "--data", tmp_path / "a.jsonl")
    assert float(row["loss"]) == pytest.approx(np.mean(losses), abs=6e-5)
    assert float(row["bits/byte"]) == pytest.approx(sum(losses) / math.log(2) / len("".join(texts).encode()), abs=6e-5)


def test_shards_and_text_have_the_same_score(run, tmp_path, capsys):
    texts = [f"{i}: {TEXT}" for i in range(60)]
    manifest = tokenize_documents(texts, tmp_path / "shards", "bytes", 0.4, shard_tokens=500)
    validation = sorted(name for name in manifest.files if "_val_" in name)
    assert len(validation) > 2
    in_val = np.concatenate([np.fromfile(tmp_path / "shards" / name, "<u2")[512:] for name in validation]).tolist()
    text = bytes(token if token != 256 else 0 for token in in_val[1:]).split(b"\0")
    (tmp_path / "text").mkdir()
    for i, document in enumerate(text):
        (tmp_path / "text" / f"{i:02}.txt").write_bytes(document)
    [shards], [files] = (table(capsys, run, "--data", tmp_path / name) for name in ("shards", "text"))
    assert {**shards, "data": ""} == {**files, "data": ""}
    [one] = table(capsys, run, "--data", tmp_path / "shards" / validation[0])
    assert one["tokens"] == "499"
    assert table(capsys, run, "--data", tmp_path / "shards", "--split", "train") != [shards]
    [few] = table(capsys, run, "--data", tmp_path / "shards", "--tokens", "70")
    losses = nats(random_model(), in_val[:71])
    assert few["tokens"] == "70" and float(few["loss"]) == pytest.approx(np.mean(losses), abs=6e-5)


def test_the_runs_own_data_as_the_trainer_validates(tmp_path, capsys):
    """The same windows and the same number as train_gpt.Net.validate, for a run and its checkpoint."""
    import train_gpt
    from data.loader import TokenStream
    from training.config import Config
    from training.ranks import Ranks

    tokens = np.random.default_rng(1).integers(0, 257, 5000)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "x_val_000000.bin", tokens)
    run = write_run(tmp_path / "run", data_dir=str(tmp_path / "data"), val_tokens=1000)
    config = Config.from_dict(json.loads((run / "config.json").read_text()))
    model, stream, alone = random_model(), TokenStream(tmp_path / "data", "val"), Ranks(0, 1, torch.device("cpu"))
    expected = train_gpt.Net(model, model, config, alone, "float32", None).validate(stream)
    shutil.copytree(run, run / "checkpoints" / "step_0000010", ignore=shutil.ignore_patterns("checkpoints"))
    rows = table(capsys, run, run / "checkpoints" / "step_0000010")
    assert [row["model"] for row in rows] == ["run", "run/step_0000010"]
    for row in rows:
        assert row["tokens"] == "992" and float(row["loss"]) == pytest.approx(expected, abs=6e-5)


def test_an_unknown_vocabulary_has_a_loss(tmp_path, capsys):
    write_shard(tmp_path / "x_val_000000.bin", np.arange(300) % 61)
    run = write_run(tmp_path / "run", vocab_size=61, data_dir=str(tmp_path))
    [row] = table(capsys, run)
    assert row["tokens"] == "299" and row["bits/byte"] == "-"
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(UserError, match="text needs a model whose vocabulary"):
        main([str(run), "--data", str(tmp_path / "a.txt")])


def test_bfloat16_is_near(run, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    [exact] = table(capsys, run, "--data", tmp_path / "a.txt")
    [near] = table(capsys, run, "--data", tmp_path / "a.txt", "--dtype", "bfloat16")
    assert near["loss"] != exact["loss"] and float(near["loss"]) == pytest.approx(float(exact["loss"]), rel=0.01)


def test_score():
    assert Score(800.0, 10, 5).perplexity == math.inf
    assert Score(math.log(2), 8, 4).bits_per_byte == pytest.approx(2)


def test_the_manifest_says_the_encoding(tmp_path):
    """A byte model may have a vocabulary that is larger than necessary, such as the default."""
    write_shard(tmp_path / "x_val_000000.bin", np.arange(200))
    run = write_run(tmp_path / "run", vocab_size=50304, data_dir=str(tmp_path))
    assert load_trained(run).encoding == "gpt2"
    info = shard_info(tmp_path / "x_val_000000.bin")
    write_manifest(tmp_path, Manifest("bytes", 257, "", "", {"x_val_000000.bin": info}))
    assert load_trained(run).encoding == "bytes"


def test_what_is_refused(run, tmp_path):
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "x_val_000000.bin", np.array([3, 2000, 5]))
    write_shard(tmp_path / "one.bin", np.array([3]))
    (tmp_path / "bytes").mkdir()
    info = write_shard(tmp_path / "bytes" / "x_val_000000.bin", np.arange(200))
    write_manifest(tmp_path / "bytes", Manifest("gpt2", 50257, "", "", {"x_val_000000.bin": info}))
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.pdf").write_text("")
    (tmp_path / "c.jsonl").write_text("")
    for data, expected in [
        ("shards", "holds the token 2000, outside the model's vocabulary of 257"),
        ("one.bin", "has 1 tokens, but an evaluation needs at least 2"),
        ("bytes", "its tokens are gpt2, but .* needs bytes; give text"),
        ("a.txt", "an empty document"),
        ("b.pdf", "is not one of .txt"),
        ("c.jsonl", "holds no documents"),
        ("none.bin", "no such shard"),
        ("none", "no such file"),
    ]:
        with pytest.raises(UserError, match=expected) as caught:
            main([str(run), "--data", str(tmp_path / data), "--device", "cpu"])
        assert len(str(caught.value).splitlines()) == 1
    for words, expected in [
        (["--tokens", "0"], "--tokens must be at least 1"),
        ([], "data is not there; give --data"),
        (["--x"], "--x"),
    ]:
        with pytest.raises(UserError, match=expected):
            main([str(run), *words])
