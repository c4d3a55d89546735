"""How much of a data set is read: by whom, and how often."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from datasets import Features, Image, IterableDataset

from maetok_hf.data import StreamingImages, open_images
from maetok_hf.data.sources import StreamSource


NUM_ROWS, NUM_SHARDS, WORLD_SIZE, NUM_WORKERS = 240, 8, 2, 2
READERS = [(rank, worker) for rank in range(WORLD_SIZE) for worker in range(NUM_WORKERS)]
BLOCK_SIZE, CHUNK_SIZE = 16, 4


def epoch_of_reader(source, rank, worker, monkeypatch, **settings):
    """Indices of the rows that one data worker of one process delivers in an epoch."""
    info = SimpleNamespace(id=worker, num_workers=NUM_WORKERS)
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: info)
    images = StreamingImages(
        source,
        **{
            "resolution": 8,
            "batch_size": 4,
            "seed": 3,
            "block_size": BLOCK_SIZE,
            "rank": rank,
            "world_size": WORLD_SIZE,
            "num_workers": NUM_WORKERS,
            **settings,
        },
    )
    batches = iter(images)
    count = images.micro_batches_per_epoch // NUM_WORKERS
    return torch.cat([next(batches)["indices"] for _ in range(count)]).tolist()


def test_each_reader_reads_its_part_of_every_format_once(make_source, monkeypatch, kind):
    source = make_source(kind, NUM_ROWS)
    read_chunk, chunks = source.read_chunk, []
    monkeypatch.setattr(source, "read_chunk", lambda chunk: (chunks.append(chunk), read_chunk(chunk))[1])
    rows_read, delivered = [], []
    for rank, worker in READERS:
        chunks.clear()
        source._open.clear()
        delivered += epoch_of_reader(source, rank, worker, monkeypatch)
        assert len(chunks) == len(set(chunks)), "nothing is read twice"
        rows_read.append(int(source.chunk_sizes[chunks].sum()))
    assert sorted(delivered) == list(range(NUM_ROWS))
    # A block at either end of a reader's part may reach into that of its neighbor.
    assert max(rows_read) <= NUM_ROWS / len(READERS) + 2 * BLOCK_SIZE


def test_each_reader_opens_only_the_bytes_it_delivers(tmp_path, toy, monkeypatch):
    for shard in range(NUM_SHARDS):
        rows = range(shard * 30, shard * 30 + 30)
        dataset = toy.in_memory([toy.png(row) for row in rows], [0] * 30)
        toy.write_parquet(tmp_path / f"train-{shard:05d}-of-00008.parquet", dataset, row_group_size=CHUNK_SIZE)
    source = open_images(tmp_path, chunk_size=CHUNK_SIZE, cache_dir=tmp_path / "counts")
    total = sum(len(toy.png(row)) for row in range(NUM_ROWS))
    import pyarrow.parquet as pq

    read_row_groups, num_bytes = pq.ParquetFile.read_row_groups, []

    def recording(self, *arguments, **settings):
        table = read_row_groups(self, *arguments, **settings)
        num_bytes.append(sum(len(image["bytes"]) for image in table["image"].to_pylist()))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", recording)
    shares = []
    for rank, worker in READERS:
        num_bytes.clear()
        epoch_of_reader(source, rank, worker, monkeypatch)
        shares.append(sum(num_bytes) / total)
    assert all(0.2 < share < 0.4 for share in shares)


def test_footers_of_parquet_files_are_read_once_although_few_files_are_open(make_source, monkeypatch):
    import pyarrow.parquet as pq

    source = make_source("parquet")
    monkeypatch.setattr("maetok_hf.data.sources.MAX_OPEN_FILES", 1)
    opened, open_ = [], pq.ParquetFile.__init__

    def recording(self, *arguments, metadata=None, **settings):
        opened.append(metadata is not None)
        open_(self, *arguments, metadata=metadata, **settings)

    monkeypatch.setattr(pq.ParquetFile, "__init__", recording)
    chunks = [0, len(source.chunk_sizes) - 1] * 3
    rows = [source.read_chunk(chunk) for chunk in chunks]
    assert opened == [False, False, True, True, True, True]
    assert rows[0] == rows[2] == rows[4] and rows[1] == rows[3] == rows[5]


@pytest.fixture
def shards_read():
    """Rows that were read of each shard of the stream."""
    return Counter()


@pytest.fixture
def stream(toy, shards_read):
    def rows(shards):
        for shard in shards:
            for row in range(shard * 30, shard * 30 + 30):
                shards_read[shard] += 1
                yield {"image": {"bytes": toy.png(row), "path": None}}

    features = Features({"image": Image()})
    return IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(NUM_SHARDS))}, features=features)


def test_no_reader_of_a_stream_reads_the_shards_of_another(stream, shards_read, monkeypatch):
    source = open_images(stream, chunk_size=CHUNK_SIZE)
    assert isinstance(source, StreamSource) and sum(shards_read.values()) == NUM_ROWS, "counted in one pass"
    delivered = []
    for rank, worker in READERS:
        shards_read.clear()
        source._open.clear()
        delivered += epoch_of_reader(source, rank, worker, monkeypatch)
        # Two shards are its own; the blocks at the ends of its part may reach into two others.
        assert len(shards_read) <= NUM_SHARDS // len(READERS) + 2
        # What lies in a shard before its part, and blocks that reach beyond it.
        assert sum(shards_read.values()) <= NUM_ROWS / len(READERS) + 30 + 2 * BLOCK_SIZE
    assert sorted(delivered) == list(range(NUM_ROWS))


def test_a_stream_of_known_sizes_is_not_counted(stream, shards_read, monkeypatch):
    counted = open_images(stream, chunk_size=CHUNK_SIZE)
    assert counted.shard_sizes == [30] * NUM_SHARDS
    shards_read.clear()
    source = open_images(stream, chunk_size=CHUNK_SIZE, shard_sizes=counted.shard_sizes)
    assert not shards_read, "opening reads nothing"
    assert source.num_rows == NUM_ROWS and source.chunk_sizes.tolist() == counted.chunk_sizes.tolist()
    assert source.read_chunk(9) == counted.read_chunk(9)


def test_shard_sizes_must_fit_the_stream(stream, toy):
    with pytest.raises(ValueError, match="`shard_sizes` must be the rows of each of the 8 shards, got 2"):
        open_images(stream, shard_sizes=[30, 30])
    with pytest.raises(ValueError, match="`shard_sizes` are for a loaded `datasets.IterableDataset`.*str"):
        open_images("someone/images", shard_sizes=[30])
    with pytest.raises(ValueError, match="has become shorter"):
        source = open_images(stream, chunk_size=CHUNK_SIZE, shard_sizes=[40] * NUM_SHARDS)
        [source.read_chunk(chunk) for chunk in range(len(source.chunk_sizes))]


def test_files_that_must_be_read_to_be_counted_are_counted_by_one_process(tmp_path, toy, monkeypatch):
    from datasets.arrow_writer import ArrowWriter

    (tmp_path / "data").mkdir()
    for shard in range(3):
        dataset = toy.in_memory([toy.png(row) for row in range(5)], [0] * 5)
        with ArrowWriter(path=str(tmp_path / "data" / f"train-{shard}.arrow"), features=dataset.features) as writer:
            writer.write_table(dataset.with_format("arrow")[:])
            writer.finalize()
    passes = []
    iterate = StreamSource.iterate
    monkeypatch.setattr(
        StreamSource, "iterate", staticmethod(lambda *arguments: (passes.append(1), iterate(*arguments))[1])
    )
    settings = {"chunk_size": CHUNK_SIZE, "cache_dir": tmp_path / "counts"}
    first = open_images(tmp_path / "data", **settings)
    assert isinstance(first, StreamSource) and first.num_rows == 15 and len(passes) == 3
    second = open_images(tmp_path / "data", **settings)
    assert second.shard_sizes == first.shard_sizes and len(passes) == 3, "the other processes find the counts"
    (tmp_path / "data" / "train-2.arrow").unlink()
    assert open_images(tmp_path / "data", **settings).num_rows == 10, "other files are counted again"
