"""The stream across shards, and the batches that each world size reads from it."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.loader import BatchLoader, TokenStream
from data.shards import Manifest, write_manifest, write_shard

COUNTS = (700, 1, 1300, 64, 935)  # 3000 tokens, borders in awkward places


@pytest.fixture(scope="module")
def whole():
    return np.random.default_rng(7).integers(0, 500, sum(COUNTS), dtype=np.uint16)


@pytest.fixture(scope="module")
def data_dir(whole, tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    parts = np.split(whole, np.cumsum(COUNTS)[:-1])
    for index, part in enumerate(parts, start=1):
        write_shard(directory / f"x_train_{index:06d}.bin", part)
    write_shard(directory / "x_val_000000.bin", np.arange(100))
    return directory


@pytest.fixture
def stream(data_dir):
    return TokenStream(data_dir, "train")


def test_the_stream(stream, whole, data_dir):
    assert stream.tokens == 3000 and stream.vocab_size is None
    np.testing.assert_array_equal(stream.read(0, 3000), whole)
    assert stream.read(5, 5).size == 0 and stream.read(3000, 3000).size == 0
    assert TokenStream(str(data_dir), "val").tokens == 100
    for start, stop in ((-1, 5), (0, 3001), (7, 6)):
        with pytest.raises(IndexError):
            stream.read(start, stop)
    for position, name, index in ((0, 1, 0), (699, 1, 699), (700, 2, 0), (701, 3, 0), (2999, 5, 934)):
        path, at = stream.locate(position)
        assert (path.name, at) == (f"x_train_{name:06d}.bin", index)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ends=st.tuples(st.integers(0, 3000), st.integers(0, 3000)))
def test_reads_cross_shard_borders(data_dir, whole, ends):
    start, stop = sorted(ends)
    stream = TokenStream(data_dir, "train")
    np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])


@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_is_what_the_definition_says(stream, whole, seed):
    batch_size, length = 8, 20
    with BatchLoader(stream, batch_size=batch_size, seq_len=length, shuffle_seed=seed) as loader:
        assert loader.sequences == 149 and loader.steps == 18
        order = np.arange(149)
        if seed is not None:
            order = np.random.Generator(np.random.PCG64(seed)).permutation(149)
        for step in range(loader.steps):
            inputs, targets = loader.batch(step)
            assert inputs.shape == targets.shape == (batch_size, length)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous() and targets.is_contiguous()
            for row in range(batch_size):
                first = order[step * batch_size + row] * length
                assert inputs[row].tolist() == whole[first : first + length].tolist()
                assert targets[row].tolist() == whole[first + 1 : first + length + 1].tolist()


def test_the_last_token_is_a_target(tmp_path):
    """T·n + 1 tokens make n sequences, T·n tokens one fewer."""
    for count, sequences in ((81, 8), (80, 7), (10, 0), (1, 0)):
        write_shard(tmp_path / "x_train_000001.bin", np.arange(count))
        with BatchLoader(TokenStream(tmp_path, "train"), batch_size=1, seq_len=10) as loader:
            assert loader.sequences == loader.steps == sequences
            if sequences:
                assert loader.batch(sequences - 1)[1][0, -1] == sequences * 10


@pytest.mark.parametrize("seed", [None, 11])
def test_every_world_size_gives_the_same_global_batches(stream, seed):
    def global_batches(world):
        loaders = [
            BatchLoader(stream, batch_size=16, seq_len=20, rank=rank, world_size=world, shuffle_seed=seed)
            for rank in range(world)
        ]
        batches = []
        for step in range(loaders[0].steps):
            parts = [loader.batch(step) for loader in loaders]
            assert all(inputs.shape == (16 // world, 20) for inputs, _ in parts)
            batches.append(torch.stack([torch.cat([part[side] for part in parts]) for side in (0, 1)]))
        for loader in loaders:
            loader.close()
        return torch.stack(batches)

    one = global_batches(1)
    assert one.shape == (9, 2, 16, 20)
    for world in (2, 4, 8):
        assert torch.equal(one, global_batches(world))


def test_the_shuffle_is_a_bijection_and_depends_on_the_seed(tmp_path):
    write_shard(tmp_path / "x_train_000001.bin", np.arange(2001))
    stream = TokenStream(tmp_path, "train")

    def firsts(seed):
        with BatchLoader(stream, batch_size=4, seq_len=10, shuffle_seed=seed) as loader:
            return torch.cat([loader.batch(step)[0][:, 0] for step in range(loader.steps)]).tolist()

    straight = list(range(0, 2000, 10))
    assert firsts(None) == straight
    one = firsts(1)
    assert one != straight and sorted(one) == straight
    assert firsts(1) == one != firsts(2)


def test_any_order_of_steps(stream):
    with BatchLoader(stream, batch_size=4, seq_len=50) as loader:
        straight = [loader.batch(step) for step in range(loader.steps)]
        order = [*np.random.default_rng(0).integers(0, loader.steps, 60).tolist(), 3, 3, 4, 4, 4, 3, 5, 0, 13]
        for step in order:
            inputs, targets = loader.batch(step)
            assert torch.equal(inputs, straight[step][0]) and torch.equal(targets, straight[step][1])


def test_batches_are_not_overwritten_by_later_ones(stream):
    with BatchLoader(stream, batch_size=4, seq_len=50) as loader:
        kept = [loader.batch(step)[0] for step in range(loader.steps)]
        copies = [inputs.clone() for inputs in kept]
        for step in range(loader.steps):
            loader.batch(step)[0].fill_(-1)
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_the_next_step_is_read_in_the_background_and_once(stream, monkeypatch):
    with BatchLoader(stream, batch_size=4, seq_len=50) as loader:
        made = []
        assemble = loader._assemble

        def slow(step):
            made.append((step, threading.current_thread() is threading.main_thread()))
            time.sleep(0.05)
            return assemble(step)

        monkeypatch.setattr(loader, "_assemble", slow)
        loader.batch(0)
        deadline = time.monotonic() + 10
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert made == [(0, True), (1, False)]
        for step in range(1, loader.steps):
            loader.batch(step)
        assert made == [(0, True), *((step, False) for step in range(1, loader.steps))]


def test_an_error_of_the_thread_is_raised_by_its_own_step(tmp_path):
    tokens = np.arange(1001) % 50
    tokens[655] = 50  # in sequence 65, batch 16 of 4
    write_shard(tmp_path / "x_train_000001.bin", tokens[:500])
    write_shard(tmp_path / "x_train_000002.bin", tokens[500:])
    stream = TokenStream(tmp_path, "train")
    with BatchLoader(stream, batch_size=4, seq_len=10, vocab_size=50) as loader:
        for step in range(16):
            loader.batch(step)
        for _ in range(2):  # from the thread, then in the foreground
            with pytest.raises(UserError, match=r"x_train_000002\.bin: token 50 \(number 155 .* step 16\).* of 50"):
                loader.batch(16)
        loader.batch(17)
    with BatchLoader(stream, batch_size=4, seq_len=10, vocab_size=51) as loader:
        assert loader.batch(16)[0].max() == 50


def test_what_is_refused(stream, tmp_path):
    def refused(message, error=UserError, **options):
        with pytest.raises(error, match=message):
            BatchLoader(stream, **{"batch_size": 6, "seq_len": 10, **options})

    refused("6 sequences cannot be divided among 4 ranks", world_size=4)
    refused("at least 1", batch_size=0)
    refused("at least 1", seq_len=0)
    refused("outside a world", ValueError, rank=2, world_size=2)
    with BatchLoader(stream, batch_size=8, seq_len=20) as loader:
        for step in (-1, 18, 10**9):
            with pytest.raises(UserError, match=f"step {step} is outside .* 3000 train tokens, enough for 18 steps"):
                loader.batch(step)
        assert loader.batch(17)[0].shape == (8, 20)
    with pytest.raises(RuntimeError, match="closed"):
        loader.batch(0)
    loader.close()
    info = write_shard(tmp_path / "x_train_000001.bin", np.arange(100))
    write_manifest(tmp_path, Manifest("gpt2", 50257, "", "", {"x_train_000001.bin": info}))
    stream = TokenStream(tmp_path, "train")
    assert stream.vocab_size == 50257
    refused("vocabulary of 50257 does not fit the model's 257", vocab_size=257)
    BatchLoader(stream, batch_size=1, seq_len=10, vocab_size=50304).close()


def test_no_thread_outlives_its_loader(stream):
    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "batch-prefetch"]

    before = threads()
    loader = BatchLoader(stream, batch_size=4, seq_len=50)
    assert all(thread.daemon for thread in threads())
    loader.batch(0)
    forgotten = loader._thread
    del loader
    forgotten.join(10)
    with BatchLoader(stream, batch_size=4, seq_len=50) as loader:
        loader.batch(0)
    assert threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_cuda(stream):
    with (
        BatchLoader(stream, batch_size=4, seq_len=50, device="cuda") as loader,
        BatchLoader(stream, batch_size=4, seq_len=50) as host,
    ):
        assert loader._assemble(0).is_pinned()
        busy = torch.randn(4096, 4096, device="cuda")
        for step in range(loader.steps):
            for _ in range(20):  # the copies queue up behind this
                busy = torch.tanh(busy @ busy)
            inputs, targets = loader.batch(step)
            assert inputs.device.type == "cuda" and inputs.is_contiguous()
            assert torch.equal(inputs.cpu(), host.batch(step)[0]) and torch.equal(targets.cpu(), host.batch(step)[1])
