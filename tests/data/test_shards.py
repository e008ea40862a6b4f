"""The shard format, the manifest and the verification of a data directory."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError, one_line_errors
from data import shards
from data.shards import (
    HEADER_BYTES,
    MANIFEST,
    Manifest,
    ShardWriter,
    check_shard,
    check_split,
    open_shard,
    read_manifest,
    shard_info,
    verify,
    write_manifest,
    write_shard,
)

ROOT = Path(__file__).resolve().parents[2]
fuzz = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def tokens_of(count, seed=0, high=50257):
    return np.random.default_rng(seed).integers(0, high, count, dtype=np.uint16)


def make_dir(path, counts=(300, 200, 100), vocab_size=50257, with_manifest=True):
    """A data directory with a train shard of each count and a val shard."""
    path.mkdir(parents=True, exist_ok=True)
    manifest = Manifest("gpt2", vocab_size, "a test", "none")
    for index, count in enumerate(counts, start=1):
        name = f"x_train_{index:06d}.bin"
        manifest.files[name] = write_shard(path / name, tokens_of(count, index, vocab_size))
    manifest.files["x_val_000000.bin"] = write_shard(path / "x_val_000000.bin", tokens_of(50, 99, vocab_size))
    if with_manifest:
        write_manifest(path, manifest)
    return path


def test_the_bytes_of_a_shard(tmp_path):
    info = write_shard(tmp_path / "a.bin", np.array([1, 50256, 65535]))
    raw = (tmp_path / "a.bin").read_bytes()
    # Written out by hand, because files made elsewhere have this format.
    assert raw[:12] == bytes.fromhex("88d83401 01000000 03000000")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == bytes.fromhex("0100 50c4 ffff")
    assert info == shards.ShardInfo(1030, 3, hashlib.sha256(raw).hexdigest(), 1, 65535)
    assert shard_info(tmp_path / "a.bin") == info


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "int32", "int64"])
def test_round_trip(tmp_path, dtype):
    tokens = tokens_of(1000).astype(dtype)
    write_shard(tmp_path / "a.bin", tokens[::2])
    back = open_shard(tmp_path / "a.bin")
    assert back.dtype == np.uint16 and isinstance(back, np.memmap)
    np.testing.assert_array_equal(back, tokens[::2])
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [[1, 2]], [0.5]])
def test_bad_tokens_are_not_written(tmp_path, tokens):
    with pytest.raises(ValueError):
        write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_next_to_its_final_name(tmp_path, monkeypatch):
    """Only a rename within one directory is atomic."""
    renamed = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (renamed.append((Path(old), Path(new))), replace(old, new)))
    write_shard(tmp_path / "a.bin", [1, 2])
    [(old, new)] = renamed
    assert old.parent == new.parent == tmp_path and new.name == "a.bin"
    assert not old.match("*_train_*.bin"), "a glob for shards would find it"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_shard(tmp_path / "a.bin", [1, 2])
    before = (tmp_path / "a.bin").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path / "a.bin", [3])
    assert (tmp_path / "a.bin").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(chunks=st.lists(st.integers(0, 25), max_size=12), size=st.integers(1, 20), split=st.sampled_from(["train", "val"]))
def test_the_writer_cuts_and_keeps_every_token(tmp_path_factory, chunks, size, split):
    directory = tmp_path_factory.mktemp("writer")
    tokens = tokens_of(sum(chunks), 5)
    writer = ShardWriter(directory, "f", split, size)
    for chunk in np.split(tokens, np.cumsum(chunks)[:-1]) if chunks else []:
        writer.write(chunk)
    writer.close()
    paths = shards.list_shards(directory, split)
    first = 0 if split == "val" else 1
    assert [path.name for path in paths] == [f"f_{split}_{first + i:06d}.bin" for i in range(-(-len(tokens) // size))]
    assert list(writer.files) == [path.name for path in paths]
    parts = [open_shard(path) for path in paths]
    assert all(len(part) == size for part in parts[:-1])
    np.testing.assert_array_equal(np.concatenate([*parts, np.zeros(0, np.uint16)]), tokens)


def test_each_fault_has_its_own_message(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, tokens_of(100))
    good = path.read_bytes()

    def header(*numbers):
        return np.array(numbers, dtype="<i4").tobytes() + good[4 * len(numbers) :]

    faults = {
        "no such shard": None,
        "too few for a shard's header": good[:1000],
        "not a token shard": b"PK\3\4" + good[4:],
        "shard version 2": header(20240520, 2),
        "its header says 0 tokens": header(20240520, 1, 0),
        "its header says -5 tokens": header(20240520, 1, -5),
        "truncated, 1222 of 1224 bytes": good[:-2],
        "1 bytes after the last": good + b"\0",
    }
    for message, raw in faults.items():
        path.unlink(missing_ok=True)
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(UserError) as caught:
            open_shard(path)
        text = str(caught.value)
        assert message in text and str(path) in text and "\n" not in text
        assert ";" in text, f"does not say what to do: {text}"
    with pytest.raises(UserError, match="is not a file"):
        check_shard(tmp_path)
    path.unlink()
    os.mkfifo(path)  # opening it would block forever
    with pytest.raises(UserError, match="is not a file"):
        check_shard(path)


def read_or_refuse(path, raw):
    """Opening the file must succeed with the right tokens if the format's definition holds, else raise `UserError`."""
    path.write_bytes(raw)
    numbers = np.frombuffer(raw[:HEADER_BYTES], dtype="<i4") if len(raw) >= HEADER_BYTES else [0, 0, 0]
    valid = numbers[0] == 20240520 and numbers[1] == 1 and numbers[2] > 0 and len(raw) == 1024 + 2 * int(numbers[2])
    try:
        found = open_shard(path)
    except UserError:
        assert not valid
        return
    assert valid
    assert np.asarray(found).tobytes() == raw[HEADER_BYTES:]


@fuzz
@given(raw=st.binary(max_size=64), pad=st.integers(0, 2000))
def test_fuzz_random_bytes(tmp_path_factory, raw, pad):
    read_or_refuse(tmp_path_factory.getbasetemp() / "fuzz.bin", raw + bytes(pad))


@fuzz
@given(
    count=st.integers(1, 40),
    bits=st.lists(st.integers(0, 8 * (12 + 1024) - 1), max_size=3),
    cut=st.integers(-4, 4),
    claimed=st.none() | st.integers(-(2**31), 2**31 - 1),
)
def test_fuzz_flipped_and_cut_shards(tmp_path_factory, count, bits, cut, claimed):
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, count
    raw = bytearray(header.tobytes() + tokens_of(count).tobytes())
    for bit in bits:
        # Half of the flips hit the twelve bytes of the header that are used.
        at = bit // 8 if bit < 96 or bit % 2 else bit // 8 % 12
        raw[at % len(raw)] ^= 1 << bit % 8
    if claimed is not None:
        raw[8:12] = np.array([claimed], dtype="<i4").tobytes()
    raw = raw[:cut] if cut < 0 else raw + bytes(cut)
    read_or_refuse(path, bytes(raw))


def test_the_manifest_round_trips_and_a_damaged_one_is_refused(tmp_path):
    directory = make_dir(tmp_path / "d")
    manifest = read_manifest(directory)
    assert manifest.vocab_size == 50257 and len(manifest.files) == 4
    write_manifest(directory, manifest)
    assert read_manifest(directory) == manifest
    assert read_manifest(tmp_path) is None
    good = json.loads((directory / MANIFEST).read_text())
    entry = good["files"]["x_val_000000.bin"]
    bad = [
        "",
        "{",
        "[]",
        "7",
        "[" * 100_000,
        json.dumps({**good, "files": {"../x_val_000000.bin": entry}}),
        json.dumps({**good, "files": {"x": {**entry, "tokens": "9"}}}),
        json.dumps({**good, "files": {"x": {"tokens": 9}}}),
        json.dumps({**good, "files": 3}),
        json.dumps({**good, "vocab_size": None}),
        json.dumps({**good, "more": 1}),
    ]
    for text in bad:
        (directory / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: damaged") as caught:
            check_split(directory, "train")
        assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(at=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_fuzz_the_manifest(tmp_path_factory, at, byte):
    directory = tmp_path_factory.getbasetemp() / "fuzzed"
    if not directory.exists():
        make_dir(directory)
        (directory / "good.json").write_bytes((directory / MANIFEST).read_bytes())
    raw = bytearray((directory / "good.json").read_bytes())
    raw[at % len(raw)] = byte
    (directory / MANIFEST).write_bytes(raw)
    for action in (lambda: check_split(directory, "train"), lambda: verify(directory)):
        try:
            action()
        except UserError as error:
            assert "\n" not in str(error)


def test_training_refuses_shards_that_disagree_with_the_manifest(tmp_path):
    directory = make_dir(tmp_path / "d")
    paths, manifest = check_split(directory, "train")
    assert [path.name[-10:-4] for path in paths] == ["000001", "000002", "000003"] and manifest.encoding == "gpt2"

    def refused(message, split="train"):
        with pytest.raises(UserError, match=message):
            check_split(directory, split)

    write_shard(directory / "x_train_000002.bin", tokens_of(150))
    refused("x_train_000002.bin: 150 tokens, but manifest.json says 200")
    check_split(directory, "val")  # the other split is not affected
    (directory / "x_train_000002.bin").unlink()
    refused("x_train_000002.bin: missing")
    (directory / "x_train_000003.bin").unlink()
    refused("x_train_000002.bin: listed in manifest.json but missing")
    (directory / MANIFEST).unlink()
    assert len(check_split(directory, "train")[0]) == 1
    (directory / "x_train_000001.bin").unlink()
    refused("holds no train shards")
    with pytest.raises(UserError, match="no such data directory"):
        check_split(tmp_path / "none", "train")


def test_a_gap_in_the_numbering_is_refused_without_a_manifest(tmp_path):
    directory = make_dir(tmp_path / "d", with_manifest=False)
    (directory / "x_train_000002.bin").unlink()
    with pytest.raises(UserError, match=r"x_train_000002\.bin: missing"):
        check_split(directory, "train")


def test_a_token_outside_the_manifests_vocabulary_is_refused(tmp_path):
    directory = make_dir(tmp_path / "d")
    manifest = read_manifest(directory)
    manifest.vocab_size = 100
    write_manifest(directory, manifest)
    with pytest.raises(UserError, match="outside its vocabulary of 100"):
        check_split(directory, "train")


def test_verify_finds_one_flipped_bit(tmp_path):
    directory = make_dir(tmp_path / "d")
    assert all(not wrong for _, wrong in verify(directory).values())
    path = directory / "x_train_000002.bin"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    check_split(directory, "train")  # the cheap check cannot see it
    wrong = {name: wrong for name, (_, wrong) in verify(directory).items() if wrong}
    assert list(wrong) == ["x_train_000002.bin"] and "sha256 differs" in wrong["x_train_000002.bin"]
    path.unlink()
    assert "no such shard" in verify(directory)["x_train_000002.bin"][1]


def run_verify(directory):
    return subprocess.run(
        [sys.executable, "-m", "data.shards", str(directory)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


@pytest.mark.slow
def test_the_command(tmp_path):
    directory = make_dir(tmp_path / "d")
    done = run_verify(directory)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("  ok") == 4 and "x_val_000000.bin" in done.stdout
    (directory / "x_val_000000.bin").write_bytes(b"nothing")
    done = run_verify(directory)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "1 of 4 shards are wrong" in done.stderr
    assert "too few for a shard's header" in done.stdout


def test_the_command_without_a_directory(tmp_path, capsys):
    for path, message in ((tmp_path / "none", "no such directory"), (tmp_path, "holds no shards")):
        with pytest.raises(SystemExit) as caught, one_line_errors("error"):
            shards.main([str(path)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
