"""The download from a hub on localhost that fails in many ways: it leaves a correct file or none.

Each download runs in its own process, as a user's does, because the hub's library reads its settings when it is imported.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError, one_line_errors
from data import fineweb
from data.shards import ShardInfo, check_split, list_shards, read_manifest, verify, write_shard
from tests.helpers.hub_server import HubServer

pytest.importorskip("huggingface_hub")

ROOT = Path(__file__).resolve().parents[2]
VAL, TRAIN, SECOND = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"
# The command, with waits that are printed in full but cut short.
COMMAND = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))
from data import fineweb
from common.errors import one_line_errors
with one_line_errors("error"):
    fineweb.main()
"""


def shard_bytes(path, count, seed, high=50257):
    write_shard(path, np.random.default_rng(seed).integers(0, high, count, dtype=np.uint16))
    return path.read_bytes()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("made") / "x.bin"
    # The first is larger than the 10 MiB that the hub's library writes at once, so that a resume shows in the requests.
    sizes = {TRAIN: 6_500_000, VAL: 1000, SECOND: 2000}
    return {name: shard_bytes(scratch, count, seed) for seed, (name, count) in enumerate(sizes.items())}


@pytest.fixture
def hub(files):
    with HubServer(fineweb.REPO, dict(files)) as server:
        yield server


def start(hub, directory, shards=1, **variables):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory.parent / "hf_home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "10",
        "HF_HUB_ETAG_TIMEOUT": "10",
        "NO_PROXY": "127.0.0.1",
        **variables,
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "--shards", str(shards), "--data-dir", str(directory)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(hub, directory, shards=1, **variables):
    return finish(start(hub, directory, shards, **variables))


def assert_right(directory, files, names=(VAL, TRAIN)):
    """The files equal the hub's and are in the manifest. Nothing else is left, here or in the cache."""
    assert [path.name for path in list_shards(directory)] == sorted(names)
    for name in names:
        assert (directory / name).read_bytes() == files[name]
    assert sorted(read_manifest(directory).files) == sorted(names)
    assert all(not wrong for _, wrong in verify(directory).values())
    assert sorted(path.name for path in directory.iterdir()) == sorted([".locks", "manifest.json", *names])
    cached = [path for path in (directory.parent / "hf_home").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in cached) < 10_000


@pytest.mark.slow
def test_a_good_hub_and_a_second_call(hub, files, tmp_path):
    directory = tmp_path / "d"
    code, out, err = run(hub, directory, 2)
    assert (code, err) == (0, "")
    assert out.count(": downloaded,") == 3
    assert_right(directory, files, (VAL, TRAIN, SECOND))
    manifest = read_manifest(directory)
    assert (manifest.encoding, manifest.vocab_size) == ("gpt2", 50257) and fineweb.REPO in manifest.source
    assert check_split(directory, "train")[1].files[SECOND].tokens == 2000

    # A second call asks the hub for nothing. Only damaged, missing and unrecorded files are repaired.
    hub.requests.clear()
    code, out, err = run(hub, directory, 2)
    assert code == 0 and out.count("already there") == 3 and err == ""
    assert not hub.count("GET", VAL) and not hub.count("HEAD")
    raw = bytearray(files[SECOND])
    raw[-1] ^= 1
    (directory / SECOND).write_bytes(raw)
    (directory / VAL).unlink()
    manifest.files.pop(TRAIN)
    fineweb.write_manifest(directory, manifest)
    code, out, err = run(hub, directory, 2)
    assert code == 0 and out.count(": downloaded,") == 2 and f"{TRAIN}: already there, now verified" in out
    assert_right(directory, files, (VAL, TRAIN, SECOND))
    assert not hub.count("GET", TRAIN)


# Faults, what is said about them, and the Range header of the request that follows.
FAULTS = {
    "GET drop": ("downloading from the hub: peer closed connection", "bytes=10485760-"),
    "GET stall": ("downloading from the hub: timed out", "bytes=10485760-"),
    "GET reset": ("again in", None),
    "GET truncate": ("again in", None),
    "GET wrong": ("sha256", None),
    "HEAD 503,HEAD 503,GET 500,GET 502": ("HTTP 500; trying again in", None),
    "HEAD 429,GET 429": ("Rate limited. Waiting 8.0s", None),
    "GET reset,HEAD 500,GET truncate,GET wrong,HEAD 429,GET drop": ("(3 of 5)", "bytes=10485760-"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_temporary_fault_ends_in_a_correct_file(hub, files, tmp_path, fault):
    said, resumed = FAULTS[fault]
    hub.faults[TRAIN] = fault.split(",")
    waits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"} if fault == "GET stall" else {}
    code, _, err = run(hub, tmp_path / "d", **waits)
    assert code == 0, err
    assert said in err and hub.url not in err
    assert hub.faults[TRAIN] == [], "a fault was not triggered"
    assert resumed in [seen for method, name, seen in hub.requests if (method, name) == ("GET", TRAIN)]
    assert_right(tmp_path / "d", files)


@pytest.mark.slow
def test_a_hub_that_redirects_to_a_cdn_and_offers_xet(hub, files, tmp_path):
    hub.cdn = True
    code, _, err = run(hub, tmp_path / "d", NO_PROXY="127.0.0.1,localhost")
    assert (code, err) == (0, "")
    assert not [name for _, name, _ in hub.requests if "xet" in name]
    assert_right(tmp_path / "d", files)
    (tmp_path / "d" / TRAIN).unlink()
    hub.files[TRAIN] = files[TRAIN][:-2] + b"\0\1"
    hub.faults[TRAIN] = ["HEAD 500"]
    assert run(hub, tmp_path / "d", NO_PROXY="127.0.0.1,localhost")[0] == 0
    assert (tmp_path / "d" / TRAIN).read_bytes() == hub.files[TRAIN]


@pytest.mark.slow
@pytest.mark.parametrize("sha256_etag", [True, False])
def test_a_permanent_fault_leaves_no_file(hub, files, tmp_path, sha256_etag):
    hub.sha256_etag = sha256_etag
    hub.faults[SECOND] = ["GET truncate", "HEAD 500"] * fineweb.ATTEMPTS
    code, _, err = run(hub, tmp_path / "d", 2)
    assert code == 2
    assert err.count("again in") == fineweb.ATTEMPTS - 1
    assert err.splitlines()[-1].startswith(f"error: {SECOND}: 5 attempts failed, the last: ")
    assert list_shards(tmp_path / "d") == [tmp_path / "d" / TRAIN, tmp_path / "d" / VAL]
    hub.faults.clear()
    assert run(hub, tmp_path / "d", 2)[0] == 0
    assert hub.count("GET", TRAIN) == 1, "a complete file was fetched again"
    assert_right(tmp_path / "d", files, (VAL, TRAIN, SECOND))


@pytest.mark.slow
def test_permanent_faults_are_reported_at_once(hub, files, tmp_path):
    def refused(message, **variables):
        code, _, err = run(hub, tmp_path / "d", **variables)
        assert code == 2 and err.count("\n") == 1 and message in err, err
        assert [path.name for path in list_shards(tmp_path / "d")] == [VAL]
        assert not (tmp_path / "d" / ".downloading" / TRAIN).exists()

    hub.files[TRAIN] = b"<html>Please log in</html>" * 100
    refused("the hub's file is not a shard (not a token shard")
    del hub.files[TRAIN]
    refused("the hub has no such file in kjj0/fineweb10B-gpt2 (404)")
    hub.faults[TRAIN] = ["HEAD 403"]
    hub.files[TRAIN] = files[TRAIN]
    refused("HTTP 403")
    refused("HF_ENDPOINT must start with http", HF_ENDPOINT="hub.example.org")
    refused("HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_wrong_content_without_a_sha256_from_the_hub(hub, files, tmp_path):
    """Only the header, the size and the token range can be checked then."""
    hub.sha256_etag = False
    hub.files[TRAIN] = shard_bytes(tmp_path / "x.bin", 1000, 3, high=65536)
    code, _, err = run(hub, tmp_path / "d")
    assert code == 2 and "outside GPT-2's vocabulary" in err.splitlines()[-1]
    assert [path.name for path in list_shards(tmp_path / "d")] == [VAL]


@pytest.mark.slow
def test_two_downloads_at_once(hub, files, tmp_path):
    hub.faults[TRAIN] = ["GET reset", "GET truncate"]
    both = [start(hub, tmp_path / "d", 2) for _ in range(2)]
    results = [finish(process) for process in both]
    assert [code for code, _, _ in results] == [0, 0], results
    assert_right(tmp_path / "d", files, (VAL, TRAIN, SECOND))
    out = results[0][1] + results[1][1]
    assert out.count(": downloaded,") == 3 and out.count(": already there,") == 3


@pytest.mark.slow
def test_a_killed_download_leaves_no_file_and_can_be_repeated(hub, files, tmp_path):
    hub.faults[TRAIN] = ["GET stall"]
    process = start(hub, tmp_path / "d", HF_HUB_DOWNLOAD_TIMEOUT="30")
    deadline = time.monotonic() + 30
    while not hub.count("GET", TRAIN):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)  # most of the file has arrived by now
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in list_shards(tmp_path / "d")] == [VAL]
    assert run(hub, tmp_path / "d")[0] == 0
    assert_right(tmp_path / "d", files)


def test_a_full_disk_gives_one_clear_line(monkeypatch, tmp_path, files, hub):
    """Before a file is fetched, or while it is written. Complete files stay."""
    import huggingface_hub

    monkeypatch.setattr(fineweb, "_on_the_hub", lambda name: fineweb._OnTheHub("c" * 40, 10_000, "e" * 64))
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def full(*_, local_dir, **__):
        local_dir.mkdir(parents=True)
        (local_dir / "partly.incomplete").write_bytes(b"12")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match=f"{VAL}: the disk is full; free some space"):
        fineweb.download(1, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(9_999))
    with pytest.raises(UserError, match=f"the disk is full .{VAL} needs 10,000 bytes, 9,999 are free"):
        fineweb.download(1, tmp_path)
    assert not slept and sorted(path.name for path in tmp_path.iterdir()) == [".downloading", ".locks"]
    assert not list((tmp_path / ".downloading").iterdir())


def test_the_waits_grow_are_jittered_and_end(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def broken():
        raise ConnectionError("gone\nfor good")

    with pytest.raises(UserError, match="x: 5 attempts failed, the last: gone for good"):
        fineweb._retried("x", broken)
    assert len(slept) == fineweb.ATTEMPTS - 1
    for number, wait in enumerate(slept):
        centre = fineweb.FIRST_WAIT * 2**number
        assert 0.5 * centre <= wait <= 1.5 * centre
    assert len({wait / 2**number for number, wait in enumerate(slept)}) > 1
    assert capsys.readouterr().err.count("\n") == len(slept)


def test_the_manifest_keeps_entries_written_at_once(tmp_path):
    (tmp_path / ".locks").mkdir()
    names = [f"fineweb_train_{index:06d}.bin" for index in range(1, 41)]
    infos = {name: ShardInfo(1026, 1, "0" * 64, 0, index) for index, name in enumerate(names)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: fineweb._record(name, infos[name], tmp_path), names))
    assert read_manifest(tmp_path).files == infos


def test_other_data_is_not_mixed_in(tmp_path, capsys):
    info = write_shard(tmp_path / "sotu_train_000001.bin", [1, 2])
    manifest = fineweb.Manifest("gpt2", 50257, "something else", "", {"sotu_train_000001.bin": info})
    fineweb.write_manifest(tmp_path, manifest)
    for count, message in ((1, "holds other data"), (0, "--shards must be 1 to 103"), (104, "--shards must be")):
        with pytest.raises(SystemExit) as caught, one_line_errors("error"):
            fineweb.main(["--shards", str(count), "--data-dir", str(tmp_path)])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1
