import itertools
import logging
import pickle
import re
import traceback

import numpy as np
import pytest
import torch

from maetok_hf.data import COUNT_NAMES, ImageSource, StreamingImages, describe_counts, resolution_at
from maetok_hf.data.order import epoch_order
from maetok_hf.data.sources import StreamSource
from maetok_hf.data.streaming import _say_how_restarts_read


NUM_ROWS = 61
# 61 rows, global batches of 8: 7 steps an epoch, 28 micro-batches of 2, 5 rows dropped.
SETTINGS = {"resolution": 8, "batch_size": 2, "seed": 5, "crop": "random", "block_size": 16, "num_streams": 4}
MICRO_BATCHES, DROPPED = 28, 5


def stream(source, **settings):
    return StreamingImages(source, **{**SETTINGS, "gradient_accumulation_steps": 4, **settings})


def take(images, count):
    return list(itertools.islice(images.dataloader(), count))


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


class Recorder:
    """Counts what is read from a source and what is decoded."""

    def __init__(self, source, monkeypatch):
        self.chunks, self.rows, self.decoded = [], 0, 0
        read_chunk, iterate, decode = source.read_chunk, StreamSource.iterate, source.decode

        def recording_read_chunk(chunk):
            self.chunks.append(chunk)
            rows = read_chunk(chunk)
            self.rows += 0 if source.sequential else len(rows)
            return rows

        def recording_iterate(*arguments):
            for rows in iterate(*arguments):
                self.rows += len(rows)
                yield rows

        def recording_decode(row):
            self.decoded += 1
            return decode(row)

        monkeypatch.setattr(source, "read_chunk", recording_read_chunk)
        monkeypatch.setattr(StreamSource, "iterate", staticmethod(recording_iterate))
        monkeypatch.setattr(source, "decode", recording_decode)


def test_a_micro_batch_has_the_promised_tensors(make_source):
    batch = take(stream(make_source()), 1)[0]
    assert list(batch) == ["images", "class_labels", "indices", "counts", "replaced", "epoch"]
    assert batch["images"].shape == (2, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["images"].is_contiguous()
    assert batch["counts"].shape == (len(COUNT_NAMES),) and not batch["counts"].any()
    for key, dtype in (("class_labels", torch.int64), ("indices", torch.int64), ("replaced", torch.bool)):
        assert batch[key].shape == (2,) and batch[key].dtype == dtype
    assert not batch["replaced"].any() and batch["epoch"] == 0


def test_indices_labels_and_pixels_belong_together(make_source, toy, kind):
    images = stream(make_source(kind), resolution=9, crop="center", random_flip=False)
    for batch in take(images, 10):
        for image, label, index in zip(batch["images"], batch["class_labels"], batch["indices"], strict=True):
            assert torch.equal(image, torch.from_numpy(toy.pixels(int(index))[:, 1:10].copy()).permute(2, 0, 1))
            assert label == toy.labels(NUM_ROWS)[index]


@pytest.mark.parametrize(
    ("world_size", "accumulation", "num_workers"), [(1, 4, 1), (1, 4, 2), (2, 2, 0), (2, 2, 2), (4, 1, 0)]
)
def test_micro_batches_do_not_depend_on_processes_accumulation_and_workers(
    make_source, kind, world_size, accumulation, num_workers
):
    source = make_source(kind)
    count = 2 * MICRO_BATCHES + 8  # into a third epoch
    expected = take(stream(source), count)
    received = [None] * count
    for rank in range(world_size):
        images = stream(
            source,
            rank=rank,
            world_size=world_size,
            gradient_accumulation_steps=accumulation,
            num_workers=num_workers,
        )
        assert images.micro_batches_per_epoch == MICRO_BATCHES // world_size
        received[rank::world_size] = take(images, count // world_size)
    assert_equal(received, expected)


def test_any_micro_batch_can_be_the_first_after_a_restart(make_source, kind):
    source = make_source(kind)
    expected = take(stream(source), 2 * MICRO_BATCHES + 3)
    for start in range(2 * MICRO_BATCHES):
        assert_equal(take(stream(source, start_micro_batch=start), 3), expected[start : start + 3])


@pytest.mark.parametrize("start", [1, 7, MICRO_BATCHES - 1, MICRO_BATCHES + 2])
def test_a_restart_with_workers_equals_the_uninterrupted_run(make_source, start):
    source = make_source("parquet")
    expected = take(stream(source), start + 9)
    assert_equal(take(stream(source, start_micro_batch=start, num_workers=2), 9), expected[start:])


def test_a_restart_on_another_number_of_processes_goes_on_with_the_same_samples(make_source):
    source = make_source()
    expected = take(stream(source), MICRO_BATCHES)
    rest = [
        take(stream(source, rank=r, world_size=2, gradient_accumulation_steps=2, start_micro_batch=5), 9)
        for r in (0, 1)
    ]
    assert_equal([batch for pair in zip(*rest, strict=True) for batch in pair], expected[10:])


def test_set_start_moves_the_next_iteration(make_source):
    images = stream(make_source())
    expected = take(images, 12)
    images.set_start(10)
    assert_equal(take(images, 2), expected[10:])
    assert_equal(take(images, 2), expected[10:])


def test_an_epoch_shows_each_sample_at_most_once_and_drops_less_than_a_global_batch(make_source, kind):
    source = make_source(kind)
    images = stream(source)
    assert images.num_dropped == DROPPED and images.micro_batches_per_epoch == MICRO_BATCHES
    batches = take(images, 3 * MICRO_BATCHES)
    missing = []
    for epoch in range(3):
        part = batches[epoch * MICRO_BATCHES : (epoch + 1) * MICRO_BATCHES]
        assert {batch["epoch"] for batch in part} == {epoch}
        indices = torch.cat([batch["indices"] for batch in part]).tolist()
        assert len(indices) == len(set(indices)) == NUM_ROWS - DROPPED and set(indices) <= set(range(NUM_ROWS))
        missing.append(frozenset(range(NUM_ROWS)) - set(indices))
    assert len(set(missing)) > 1, "another epoch should leave out other samples"
    assert [images.epoch_of(k) for k in (0, MICRO_BATCHES - 1, MICRO_BATCHES)] == [0, 0, 1]


def test_epochs_and_seeds_have_orders_of_their_own(make_source, kind):
    source = make_source(kind)

    def order(epoch, **settings):
        images = stream(source, start_micro_batch=epoch * MICRO_BATCHES, **settings)
        return torch.cat([batch["indices"] for batch in take(images, MICRO_BATCHES)]).tolist()

    orders = [order(0), order(1), order(0, seed=6)]
    assert orders[0] == order(0)
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_without_shuffling_one_stream_follows_the_data_set(make_source, kind):
    images = stream(make_source(kind), shuffle=False, num_streams=1)
    indices = torch.cat([batch["indices"] for batch in take(images, MICRO_BATCHES + 1)]).tolist()
    assert indices == [*range(NUM_ROWS - DROPPED), 0, 1]


def test_streams_are_contiguous_parts_dealt_in_turn(make_source):
    images = stream(make_source(), shuffle=False, num_streams=4)
    indices = torch.stack([batch["indices"] for batch in take(images, MICRO_BATCHES)])
    for number in range(4):
        assert indices[number::4].flatten().tolist() == list(range(14 * number, 14 * (number + 1)))


def test_uneven_streams_cover_the_epoch_too(make_source):
    # 30 micro-batches over 4 streams: 8, 8, 7, 7.
    images = stream(make_source(), gradient_accumulation_steps=1)
    indices = torch.cat([batch["indices"] for batch in take(images, 30)])
    assert images.micro_batches_per_epoch == 30 and images.num_dropped == 1
    assert len(set(indices.tolist())) == 60


def test_blocks_mix_distant_chunks(make_source):
    # The rows are sorted by class: neighbouring rows alone would give batches of one class.
    images = stream(make_source(), batch_size=8, num_streams=1, gradient_accumulation_steps=1)
    mixed = [len(set(batch["class_labels"].tolist())) > 1 for batch in take(images, 7)]
    assert sum(mixed) >= 6


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 1000])
def test_blocks_hold_whole_chunks_up_to_the_block_size(make_source, block_size):
    source = make_source("parquet")
    order = epoch_order(source, 0, 0, block_size, shuffle=True)
    assert sorted(order.chunks.tolist()) == list(range(len(source.chunk_sizes)))
    assert order.block_rows[0] == 0 and order.block_rows[-1] == NUM_ROWS
    for block in range(order.num_blocks):
        chunks = order.chunks[order.block_chunks[block] : order.block_chunks[block + 1]]
        size = source.chunk_sizes[chunks].sum()
        assert size == order.block_rows[block + 1] - order.block_rows[block] > 0
        assert size <= block_size or len(chunks) == 1
        for position in (order.block_rows[block], order.block_rows[block + 1] - 1):
            assert order.block_of(position) == block


def test_shards_of_a_stream_are_read_forward(make_source):
    source = make_source("stream")
    first = epoch_order(source, 0, 0, 16, shuffle=True).chunks
    shards = source.chunk_shards[first]
    assert (np.diff(shards) != 0).sum() == 2, "each shard is one run"
    for shard in range(3):
        assert (np.diff(first[shards == shard]) == 1).all()
    orders = {tuple(epoch_order(source, 0, epoch, 16, shuffle=True).chunks) for epoch in range(20)}
    assert len(orders) > 3, "the shards are permuted"


def test_a_restart_reads_one_block_and_decodes_one_micro_batch(make_source, monkeypatch, kind):
    source = make_source(kind)
    order = epoch_order(source, SETTINGS["seed"], 1, SETTINGS["block_size"], shuffle=True)
    recorder = Recorder(source, monkeypatch)
    skipped = []
    for start in range(MICRO_BATCHES, 2 * MICRO_BATCHES):
        recorder.chunks, recorder.rows, recorder.decoded = [], 0, 0
        source._open.clear()  # of an earlier restart
        images = stream(source, start_micro_batch=start)
        next(iter(images))
        position = np.searchsorted(order.block_chunks, np.flatnonzero(np.isin(order.chunks, recorder.chunks)), "right")
        # A micro-batch may begin at the end of one block and go on in the next.
        blocks = set(position)
        assert len(blocks) <= 2 and recorder.decoded == SETTINGS["batch_size"]
        needed = sum(int(np.diff(order.block_rows)[block - 1]) for block in blocks)
        skipped.append(recorder.rows - needed)
        if source.sequential:  # and what lies before it in its shards
            shards = source.chunk_shards[recorder.chunks]
            before = [np.flatnonzero(source.chunk_shards == shard)[0] for shard in set(shards.tolist())]
            firsts = [min(np.asarray(recorder.chunks)[shards == shard]) for shard in set(shards.tolist())]
            ahead = source.chunk_starts[firsts] - source.chunk_starts[before]
            assert skipped[-1] == ahead.sum()
    assert (max(skipped) > 0) == source.sequential and min(skipped) == 0


def test_a_source_without_random_access_says_once_how_a_restart_reads_it(make_source, caplog):
    caplog.set_level(logging.INFO, logger="maetok_hf")
    _say_how_restarts_read.cache_clear()
    for kind in ("parquet", "webdataset", "stream", "stream"):
        source = make_source(kind)
        for _ in range(2):
            stream(source)
    said = [record.message for record in caplog.records if "can only be read from their beginning" in record.message]
    assert len(said) == 1 and source.description in said[0]


def test_every_process_reads_its_own_part_once(make_source, monkeypatch):
    source = make_source("dataset", 200)
    recorder = Recorder(source, monkeypatch)
    read = []
    for rank in (0, 1):
        recorder.chunks = []
        images = stream(source, num_streams=2, rank=rank, world_size=2, gradient_accumulation_steps=1)
        list(itertools.islice(iter(images), images.micro_batches_per_epoch))
        assert len(recorder.chunks) == len(set(recorder.chunks)), "nothing is read twice in an epoch"
        read.append(set(recorder.chunks))
    shared = read[0] & read[1]
    assert len(shared) <= 4, "only the block at the border of the streams is read by both"
    assert read[0] | read[1] == set(range(50))


def test_crop_and_flip_belong_to_the_sample_and_the_epoch(make_source):
    source = make_source()

    def by_index(**settings):
        images = stream(source, **settings)
        batches = take(images, images.micro_batches_per_epoch)
        return {int(i): x for batch in batches for i, x in zip(batch["indices"], batch["images"], strict=True)}

    first = by_index()
    for other in (
        by_index(shuffle=False),
        by_index(batch_size=5, gradient_accumulation_steps=1),
        by_index(num_streams=2),
    ):
        common = first.keys() & other.keys()
        assert len(common) > 40
        assert all(torch.equal(first[index], other[index]) for index in common)
    later = by_index(start_micro_batch=MICRO_BATCHES)
    assert sum(not torch.equal(first[index], later[index]) for index in first.keys() & later.keys()) > 30


MIXED = {"resolution": (8, 16, 12), "resolution_weights": (2, 1, 1)}


def test_all_images_of_a_step_have_the_resolution_of_the_step(make_source):
    images = stream(make_source(), **MIXED)
    assert images.resolutions == (8, 16, 12)
    found = [batch["images"].shape[-1] for batch in take(images, 2 * MICRO_BATCHES)]
    expected = [
        resolution_at(SETTINGS["seed"], step, (8, 16, 12), (2, 1, 1)) for step in range(2 * MICRO_BATCHES // 4)
    ]
    assert found == [resolution for resolution in expected for _ in range(4)]
    assert set(found) == {8, 16, 12}
    assert [images.resolution_of(number) for number in range(2 * MICRO_BATCHES)] == found


def test_the_resolution_changes_nothing_but_the_size_of_the_images(make_source):
    source = make_source()
    alone = {size: take(stream(source, resolution=size), MICRO_BATCHES + 4) for size in (8, 16, 12)}
    for number, batch in enumerate(take(stream(source, **MIXED), MICRO_BATCHES + 4)):
        same = {**alone[batch["images"].shape[-1]][number], "counts": batch["counts"]}
        assert_equal([batch], [same])


@pytest.mark.parametrize(("world_size", "accumulation", "num_workers"), [(1, 4, 2), (2, 2, 0), (2, 2, 2), (4, 1, 0)])
def test_mixed_resolutions_do_not_depend_on_processes_accumulation_and_workers(
    make_source, world_size, accumulation, num_workers
):
    source, count = make_source("parquet"), MICRO_BATCHES + 8
    settings = {**MIXED, "world_size": world_size, "gradient_accumulation_steps": accumulation}
    received = [None] * count
    for rank in range(world_size):
        images = stream(source, **settings, rank=rank, num_workers=num_workers)
        received[rank::world_size] = take(images, count // world_size)
    assert_equal(received, take(stream(source, **MIXED), count))


@pytest.mark.parametrize("start", [0, 4, 9, MICRO_BATCHES + 1])
def test_a_restart_goes_on_with_the_resolution_of_its_step(make_source, start):
    source = make_source()
    expected = take(stream(source, **MIXED), start + 6)
    assert_equal(take(stream(source, **MIXED, start_micro_batch=start, num_workers=2), 6), expected[start:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_batches_that_are_let_go_and_batches_that_are_kept_are_the_same(make_source, num_workers):
    source, expected = make_source(), take(stream(make_source()), 24)
    loader = iter(stream(source, num_workers=num_workers).dataloader())
    kept = []
    for number in range(24):
        batch = next(loader)
        assert_equal([batch], [expected[number]])
        if number % 3 == 0:
            kept.append((number, batch["images"][1:]))
    for number, images in kept:
        assert torch.equal(images, expected[number]["images"][1:])


def test_global_random_state_is_neither_read_nor_changed(make_source):
    source = make_source()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    expected = take(stream(source, num_workers=2), 5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert_equal(take(stream(source, num_workers=2), 5), expected)


def test_it_can_be_sent_to_another_process(make_source, kind):
    images = stream(make_source(kind))
    expected = take(images, 4)
    assert_equal(take(pickle.loads(pickle.dumps(images)), 4), expected)


def test_a_data_set_without_labels_has_no_class_labels(make_source, tmp_path, toy):
    from maetok_hf.data import open_images

    images = stream(open_images(toy.in_memory([toy.png(i) for i in range(8)], [0] * 8), use_labels=False))
    assert "class_labels" not in take(images, 1)[0]


def end_workers(error):
    """Drop what an error in a worker keeps alive; left to the garbage collector, torch waits 5 s for each worker."""
    traceback.clear_frames(error.tb)


def corrupt(toy, bad, num_rows=NUM_ROWS):
    return [b"no image" if index in bad else toy.png(index) for index in range(num_rows)]


@pytest.mark.parametrize("broken_kind", ["dataset", "parquet", "webdataset", "stream"])
def test_a_corrupt_image_is_replaced_counted_and_reported(make_source, toy, caplog, broken_kind):
    bad = {3, 4, 40}
    source = make_source(broken_kind, images=corrupt(toy, bad))
    settings = {"resolution": 9, "crop": "center", "random_flip": False}
    good = {bytes(toy.pixels(index)[:, 1:10].tobytes()): index for index in range(NUM_ROWS) if index not in bad}
    images = stream(source, **settings)
    order = epoch_order(source, SETTINGS["seed"], 0, SETTINGS["block_size"], shuffle=True)
    block = np.repeat(np.arange(order.num_blocks), np.diff(order.block_chunks))[np.argsort(order.chunks)]
    block_of_row = np.repeat(block, source.chunk_sizes)
    with caplog.at_level(logging.WARNING, "maetok_hf"):
        batches = take(images, MICRO_BATCHES)
    seen = set()
    for batch in batches:
        for position, index in enumerate(batch["indices"].tolist()):
            seen.add(index)
            assert batch["replaced"][position] == (index in bad)
            stand_in = good[batch["images"][position].permute(1, 2, 0).numpy().tobytes()]
            assert batch["class_labels"][position] == toy.labels(NUM_ROWS)[stand_in]
            assert block_of_row[stand_in] == block_of_row[index]
            assert (stand_in == index) == (index not in bad)
    assert len(seen) == NUM_ROWS - DROPPED
    for index in bad & seen:
        assert f"Row {index} of" in caplog.text
    counts = torch.stack([batch["counts"] for batch in batches]).sum(0)
    assert describe_counts(counts) == f"{len(bad & seen)} corrupt"
    assert_equal([take(stream(source, **settings, start_micro_batch=k), 1)[0] for k in range(MICRO_BATCHES)], batches)


def test_a_missing_image_file_is_replaced_too(make_source, tmp_path):
    source = make_source("imagefolder")
    (tmp_path / "imagefolder" / "train" / "cat" / "0002.png").unlink()
    batches = take(stream(source, gradient_accumulation_steps=1), 30)
    replaced = [int(i) for b in batches for i, r in zip(b["indices"], b["replaced"], strict=True) if r]
    assert replaced == [2]


def test_a_whole_block_of_corrupt_images_is_replaced_from_the_next(make_source, toy):
    source = make_source(images=corrupt(toy, set(range(16))))
    images = stream(source, shuffle=False, num_streams=1)
    replaced = torch.cat([batch["replaced"] for batch in take(images, MICRO_BATCHES)])
    assert replaced.tolist() == [True] * 16 + [False] * (NUM_ROWS - DROPPED - 16)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_corrupt_images_are_an_error(make_source, toy, num_workers):
    source = make_source(images=corrupt(toy, set(range(20)), 20))
    with pytest.raises(ValueError, match="No usable row.*UnidentifiedImageError") as error:
        take(stream(source, num_workers=num_workers), 1)
    end_workers(error)


def test_a_missing_label_is_minus_one_or_replaced_where_labels_are_required(make_source, toy):
    classes = toy.labels(NUM_ROWS)
    classes[7], classes[50] = None, None
    source = make_source(classes=classes)
    batches = take(stream(source, gradient_accumulation_steps=1), 30)
    indices, found = (torch.cat([batch[key] for batch in batches]) for key in ("indices", "class_labels"))
    assert set(indices[found < 0].tolist()) == {7, 50} & set(indices.tolist())
    assert not any(batch["replaced"].any() for batch in batches)

    batches = take(stream(source, gradient_accumulation_steps=1, require_labels=True), 30)
    replaced, required = (torch.cat([batch[key] for batch in batches]) for key in ("replaced", "class_labels"))
    assert required.min() >= 0
    assert set(indices[replaced].tolist()) == {7, 50} & set(indices.tolist())


def test_required_labels_must_exist(make_source, toy):
    from maetok_hf.data import open_images

    with pytest.raises(ValueError, match="No usable row.*label.*whether the split has labels"):
        take(stream(make_source(classes=[None] * 20, images=corrupt(toy, (), 20)), require_labels=True), 1)
    unlabelled = open_images(toy.in_memory([toy.png(i) for i in range(20)], [0] * 20), use_labels=False)
    with pytest.raises(ValueError, match="`require_labels=True`.*`label_column`"):
        stream(unlabelled, require_labels=True)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("resolution", 0),
        ("resolution_weights", (1, 2)),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("seed", 1.5),
        ("block_size", 0),
        ("world_size", 0),
        ("rank", -1),
        ("rank", 1),
        ("gradient_accumulation_steps", 0),
        ("num_workers", -1),
        ("num_streams", 0),
        ("start_micro_batch", -1),
        ("source", "imagenet"),
    ],
)
def test_bad_arguments_are_named(make_source, argument, value):
    settings = {"source": make_source(), **SETTINGS, argument: value}
    shown = "str" if argument == "source" else str(value)
    with pytest.raises(ValueError, match=f"`{argument}`.*{re.escape(shown)}"):
        StreamingImages(**settings)


def test_streams_must_be_a_multiple_of_the_readers(make_source):
    source = make_source()
    with pytest.raises(ValueError, match=r"`num_streams=4` must be a multiple.* 2 \* 3 = 6.*up to 6"):
        stream(source, world_size=2, num_workers=3)
    assert stream(source, world_size=2, num_workers=3, num_streams=None).num_streams == 6
    assert stream(source, num_streams=None).num_streams == 1


def test_a_data_set_smaller_than_a_global_batch_is_refused(make_source):
    with pytest.raises(ValueError, match="61 rows, fewer than one global batch of 64.*`batch_size=8`.*`world_size=4`"):
        stream(make_source(), batch_size=8, world_size=4, gradient_accumulation_steps=2)


def test_a_loader_with_another_number_of_workers_is_refused(make_source):
    loader = torch.utils.data.DataLoader(stream(make_source()), batch_size=None, num_workers=2)
    with pytest.raises(ValueError, match="2 workers.*`num_workers=0`.*dataloader") as error:
        next(iter(loader))
    end_workers(error)


def test_sources_are_not_made_by_hand(make_source):
    with pytest.raises(ValueError, match="open_images"):
        stream(make_source().dataset)
    with pytest.raises(ValueError, match="has no rows"):
        ImageSource("nothing", make_source().columns, [])
