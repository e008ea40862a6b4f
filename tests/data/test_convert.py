"""Tokens of build-nanogpt and nanoGPT into shards: all of them, in order, or one line that says what is wrong."""

import numpy as np
import pytest

from common.errors import UserError, one_line_errors
from data import convert, shards
from data.shards import check_split, list_shards, open_shard, read_manifest, verify, write_shard


def tokens_of(count, seed, high=50257):
    return np.random.default_rng(seed).integers(0, high, count, dtype=np.uint16)


TRAIN, VAL = tokens_of(1000, 1), tokens_of(300, 2)


def build_nanogpt(folder):
    folder.mkdir()
    np.save(folder / "edufineweb_val_000000", VAL)
    for index, part in enumerate(np.array_split(TRAIN, 3), 1):
        np.save(folder / f"edufineweb_train_{index:06d}", part)
    return folder


def nanogpt(folder):
    folder.mkdir()
    TRAIN.tofile(folder / "train.bin")
    VAL.tofile(folder / "val.bin")
    return folder


def written(folder, split):
    return np.concatenate([open_shard(path) for path in list_shards(folder, split)])


@pytest.mark.parametrize("make", [build_nanogpt, nanogpt])
def test_every_token_is_kept(tmp_path, make, monkeypatch):
    monkeypatch.setattr(convert, "_PIECE", 64)
    source = make(tmp_path / "source")
    manifest = convert.convert(source, tmp_path / "out", shard_tokens=400)
    np.testing.assert_array_equal(written(tmp_path / "out", "train"), TRAIN)
    np.testing.assert_array_equal(written(tmp_path / "out", "val"), VAL)
    assert read_manifest(tmp_path / "out") == manifest
    assert (manifest.encoding, manifest.vocab_size) == ("gpt2", 50257) and make.__name__[-7:] in manifest.source.lower()
    assert [len(check_split(tmp_path / "out", split)[0]) for split in ("train", "val")] == [3, 1]
    assert all(not wrong for _, wrong in verify(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("make", "words"), [(build_nanogpt, "the .npy shards of build-nanogpt"), (nanogpt, "train.bin and val")]
)
def test_training_and_verifying_name_the_format_and_the_command(tmp_path, make, words):
    source = make(tmp_path / "source")
    for refuse in (lambda: check_split(source, "val"), lambda: shards.main([str(source)])):
        with pytest.raises(UserError) as caught:
            refuse()
        assert words in str(caught.value) and f"python -m data.convert {source} --out DIR" in str(caught.value)


def test_the_command(tmp_path, capsys):
    source = nanogpt(tmp_path / "source")
    convert.main([str(source), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.splitlines() == [
        "train: 1,000 tokens in 1 shards",
        "val: 300 tokens in 1 shards",
        f"gpt2, vocabulary 50257, in {tmp_path / 'out'}",
    ]
    with pytest.raises(SystemExit) as caught, one_line_errors("error"):
        convert.main([str(source), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "already holds 2 shards" in error and error.count("\n") == 1


def test_another_vocabulary_has_a_size(tmp_path):
    """nanoGPT writes meta.pkl beside tokens that are not GPT-2's. It is never loaded: a pickle can run code."""
    source = nanogpt(tmp_path / "source")
    (source / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match=r"meta.pkl: so the tokens are not GPT-2's; .* with --vocab-size"):
        convert.convert(source, tmp_path / "out")
    manifest = convert.convert(source, tmp_path / "out", 60_000)
    assert (manifest.encoding, manifest.vocab_size) == ("of 60000 tokens", 60_000)
    with pytest.raises(UserError, match="at most 65536"):
        convert.convert(source, tmp_path / "more", 70_000)


VAL_NPY = "edufineweb_val_000000.npy"


def cut(path, count):
    path.write_bytes(path.read_bytes()[:-count])


# Who wrote the folder, what happens to it, and what is said.
FAULTS = [
    (build_nanogpt, lambda d: (d / VAL_NPY).unlink(), "holds neither *_val_*.npy (build-nanogpt) nor val.bin (nanoGPT)"),
    (build_nanogpt, lambda d: (d / "edufineweb_train_000002.npy").unlink(), "edufineweb_train_000002.npy: missing"),
    (build_nanogpt, lambda d: cut(d / VAL_NPY, 5), f"{VAL_NPY}: cannot be read"),
    (build_nanogpt, lambda d: np.save(d / VAL_NPY, np.ones(3)), "holds float64[3], not a row of tokens"),
    (build_nanogpt, lambda d: np.save(d / VAL_NPY, np.ones((2, 2), int)), "holds int64[2, 2], not a row of tokens"),
    (build_nanogpt, lambda d: np.save(d / VAL_NPY, np.array([{}])), "cannot be read (Array can't be memory-mapped"),
    (build_nanogpt, lambda d: np.save(d / VAL_NPY, VAL[:0]), f"{VAL_NPY}: holds no tokens"),
    (
        build_nanogpt,
        lambda d: np.save(d / VAL_NPY, np.array([1, -1])),
        "token -1 (number 1) is outside the vocabulary of 50257",
    ),
    (nanogpt, lambda d: (d / "train.bin").unlink(), "holds neither *_train_*.npy"),
    (nanogpt, lambda d: cut(d / "val.bin", 1), "val.bin: has an odd number of bytes"),
    (nanogpt, lambda d: (d / "val.bin").write_bytes(b""), "val.bin: cannot be read"),
    (
        nanogpt,
        lambda d: write_shard(d / "val.bin", VAL),
        "is a shard already, under another name; rename it to tokens_val_",
    ),
    (nanogpt, lambda d: np.array([1, 50300], np.uint16).tofile(d / "val.bin"), "token 50300 (number 1) is outside"),
    (nanogpt, lambda d: d.rename(d.parent / "elsewhere"), "no such directory"),
]


@pytest.mark.parametrize(("make", "damage", "message"), FAULTS, ids=[message for *_, message in FAULTS])
def test_a_fault_is_one_line_and_leaves_nothing(tmp_path, make, damage, message):
    source = make(tmp_path / "source")
    damage(source)
    with pytest.raises(UserError) as caught:
        convert.convert(source, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_disk_that_forgets_is_noticed(tmp_path, monkeypatch):
    real = shards.write_shard

    def forgetful(path, tokens):
        info = real(path, tokens)
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
        return info

    monkeypatch.setattr(shards, "write_shard", forgetful)
    with pytest.raises(UserError, match="reads back other than it was written"):
        convert.convert(nanogpt(tmp_path / "n"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
