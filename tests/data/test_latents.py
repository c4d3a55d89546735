"""Cached latents come in an order that depends on the seed alone, normalised, each image once an epoch."""

import itertools
import json
import logging
import pickle

import numpy as np
import pytest
import torch

from maetok_hf.data import StreamingLatents, open_latents
from maetok_hf.data.order import epoch_order
from maetok_hf.models.latents import normalize_latents
from tests.data.latent_caches import SHAPE, labels, values, write_cache


# 61 rows, global batches of 8: 7 steps an epoch, 28 micro-batches of 2, 5 rows dropped.
SETTINGS = {"batch_size": 2, "seed": 5, "block_size": 16, "num_streams": 4, "gradient_accumulation_steps": 4}
NUM_ROWS, MICRO_BATCHES, DROPPED = 61, 28, 5


@pytest.fixture
def make_source(tmp_path, monkeypatch):
    # small row groups, so that a block holds several
    monkeypatch.setattr("maetok_hf.data.latent_shards._GROUP_ROWS", 4)

    def make(**settings):
        folder = tmp_path / "cache"
        write_cache(folder, **settings)
        return open_latents(folder)

    return make


def stream(source, **settings):
    return StreamingLatents(source, **(SETTINGS | settings))


def take(latents, count):
    return list(itertools.islice(latents.dataloader(), count))


def order(latents, count):
    return torch.cat([batch["indices"] for batch in take(latents, count)]).tolist()


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


def views_of(batch):
    """Which view each sample of a batch shows, of a cache with mean 0 and standard deviation 1."""
    raw = torch.from_numpy(values(batch["indices"].numpy(), dtype="float32"))
    matches = (raw == batch["latents"]).flatten(2).all(2)
    assert matches.sum(0).eq(1).all()
    return matches[1].long().tolist()


def test_a_micro_batch_has_the_promised_tensors(make_source):
    batch = take(stream(make_source()), 1)[0]
    assert list(batch) == ["latents", "class_labels", "indices", "replaced", "epoch"]
    assert batch["latents"].shape == (2, *SHAPE) and batch["latents"].dtype == torch.float32
    assert batch["latents"].is_contiguous()
    for key, dtype in (("class_labels", torch.int64), ("indices", torch.int64), ("replaced", torch.bool)):
        assert batch[key].shape == (2,) and batch[key].dtype == dtype
    assert not batch["replaced"].any() and batch["epoch"] == 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_latents_labels_and_indices_belong_together(make_source, dtype):
    latents = stream(make_source(dtype=dtype, left_out=[3, 17], unlabeled=[8]), random_flip=False)
    seen = []
    for batch in take(latents, MICRO_BATCHES):
        rows = batch["indices"].tolist()
        assert torch.equal(batch["latents"], torch.from_numpy(values(rows, dtype="float32")[0]))
        assert batch["class_labels"].tolist() == labels(rows, unlabeled=[8]).tolist()
        seen += rows
    assert len(set(seen)) == len(seen) == 56 and not {3, 17} & set(seen)


@pytest.mark.parametrize(
    ("mean", "std"), [(None, None), (0.3, 2.0), ([0.5, -1.0, 3.0], [1.5, 0.7, 0.1])], ids=["own", "scalar", "channel"]
)
def test_latents_are_normalised_as_for_a_generator(make_source, mean, std):
    latents = stream(make_source(statistics=(7.3, 1.7)), latents_mean=mean, latents_std=std, random_flip=False)
    batch = take(latents, 1)[0]
    config = {"latents_mean": 7.3 if mean is None else mean, "latents_std": 1.7 if std is None else std}
    raw = torch.from_numpy(values(batch["indices"].numpy(), dtype="float32")[0])
    assert torch.equal(batch["latents"], normalize_latents(raw, config))


@pytest.mark.parametrize(
    ("world_size", "accumulation", "num_workers"), [(1, 4, 1), (1, 4, 2), (2, 2, 0), (2, 2, 2), (4, 1, 0)]
)
def test_micro_batches_do_not_depend_on_processes_accumulation_and_workers(
    make_source, world_size, accumulation, num_workers
):
    source = make_source()
    count = 2 * MICRO_BATCHES + 8  # into a third epoch
    expected = take(stream(source), count)
    received = [None] * count
    for rank in range(world_size):
        settings = {"rank": rank, "world_size": world_size, "gradient_accumulation_steps": accumulation}
        latents = stream(source, **settings, num_workers=num_workers)
        assert latents.micro_batches_per_epoch == MICRO_BATCHES // world_size
        received[rank::world_size] = take(latents, count // world_size)
    assert_equal(received, expected)


def test_any_micro_batch_can_be_the_first_after_a_restart(make_source):
    source = make_source()
    expected = take(stream(source), 2 * MICRO_BATCHES + 3)
    for start in range(2 * MICRO_BATCHES):
        assert_equal(take(stream(source, start_micro_batch=start), 3), expected[start : start + 3])


@pytest.mark.parametrize("start", [7, MICRO_BATCHES + 2])
def test_a_restart_with_workers_equals_the_uninterrupted_run(make_source, start):
    source = make_source()
    expected = take(stream(source), start + 9)
    assert_equal(take(stream(source, start_micro_batch=start, num_workers=2), 9), expected[start:])


def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_global_batch(make_source):
    latents = stream(make_source())
    assert latents.num_dropped == DROPPED and latents.micro_batches_per_epoch == MICRO_BATCHES
    missing = set()
    for epoch in range(3):
        latents.set_start(epoch * MICRO_BATCHES)
        indices = order(latents, MICRO_BATCHES)
        assert len(indices) == len(set(indices)) == NUM_ROWS - DROPPED
        missing.add(frozenset(range(NUM_ROWS)) - set(indices))
    assert len(missing) > 1, "another epoch should leave out other images"


def test_epochs_and_seeds_have_orders_of_their_own(make_source):
    source = make_source()
    orders = [order(stream(source, **settings), MICRO_BATCHES) for settings in ({}, {"seed": 6}, {"num_streams": 2})]
    orders.append(order(stream(source, start_micro_batch=MICRO_BATCHES), MICRO_BATCHES))
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert order(stream(source), MICRO_BATCHES) == orders[0]


def test_without_shuffling_one_stream_follows_the_data_set(make_source):
    latents = stream(make_source(), shuffle=False, num_streams=1)
    assert order(latents, MICRO_BATCHES + 1) == [*range(NUM_ROWS - DROPPED), 0, 1]


def test_mirror_images_are_drawn_for_each_epoch_and_image(make_source):
    source = make_source()

    def views(**settings):
        latents = stream(source, **settings)
        batches = take(latents, latents.micro_batches_per_epoch)
        indices = torch.cat([batch["indices"] for batch in batches]).tolist()
        return dict(zip(indices, itertools.chain(*map(views_of, batches)), strict=True))

    first = views()
    assert 15 < sum(first.values()) < 41
    for same in (views(num_streams=2), views(shuffle=False), views(batch_size=7, gradient_accumulation_steps=1)):
        assert len(first.keys() & same.keys()) > 40
        assert all(first[index] == same[index] for index in first.keys() & same.keys())
    for other in (views(seed=6), views(start_micro_batch=MICRO_BATCHES)):
        assert sum(first[index] != other[index] for index in first.keys() & other.keys()) > 10
    assert not any(views(random_flip=False).values())


def test_a_restart_reads_one_block_of_each_stream_again(make_source, monkeypatch):
    source = make_source()
    plan = epoch_order(source, SETTINGS["seed"], 0, SETTINGS["block_size"], shuffle=True)
    most = max(np.diff(plan.block_chunks))
    read, read_chunk = [], source.read_chunk
    monkeypatch.setattr(source, "read_chunk", lambda *chunk: read.append(chunk) or read_chunk(*chunk))
    for start in range(MICRO_BATCHES):
        read.clear()
        next(iter(stream(source, start_micro_batch=start)))
        assert len(read) <= 2 * most  # a micro-batch may begin at the end of one block and go on in the next


def test_only_the_views_that_are_used_are_read(make_source, monkeypatch):
    source = make_source()
    seen, read_table = [], source._files.read_table
    monkeypatch.setattr(
        source._files, "read_table", lambda chunk, names: seen.append(names) or read_table(chunk, names)
    )
    next(iter(stream(source, random_flip=False)))
    assert {tuple(names) for names in seen} == {("latent", "label", "index")}


UNLABELED = [index for index in range(NUM_ROWS) if index % 5 < 2]


def test_a_labeled_row_stands_in_for_one_without_label(make_source, caplog):
    source = make_source(unlabeled=UNLABELED)
    plain = take(stream(source), MICRO_BATCHES)
    with caplog.at_level(logging.WARNING):
        required = take(stream(source, require_labels=True), MICRO_BATCHES)
    assert f"{len(UNLABELED)} of 61 rows of the latents" in caplog.text
    num_replaced = 0
    for batch, expected in zip(required, plain, strict=True):
        assert torch.equal(batch["indices"], expected["indices"])
        assert batch["class_labels"].min() >= 0
        for number, index in enumerate(batch["indices"].tolist()):
            replaced = batch["replaced"][number].item()
            assert replaced == (index in UNLABELED)
            assert torch.equal(batch["latents"][number], expected["latents"][number]) != replaced
            value = round(batch["latents"][number, 0, 0].item())
            shown = value if value >= 0 else -1 - value
            assert shown not in UNLABELED and batch["class_labels"][number] == shown % 3
            num_replaced += replaced
    assert num_replaced > 15


def test_the_stand_in_comes_from_another_block_if_need_be(make_source):
    source = make_source(unlabeled=range(1, NUM_ROWS))
    for batch in take(stream(source, require_labels=True, random_flip=False), MICRO_BATCHES):
        assert torch.equal(batch["latents"], torch.from_numpy(values([0, 0], dtype="float32")[0]))
        assert batch["replaced"].tolist() == [index != 0 for index in batch["indices"].tolist()]


def test_labels_are_required_of_a_cache_that_has_some(make_source):
    with pytest.raises(ValueError, match="`require_labels=True`, but the latents in .* have no labels at all"):
        stream(make_source(unlabeled=range(NUM_ROWS)), require_labels=True)


def test_global_random_state_is_neither_read_nor_changed(make_source):
    source = make_source()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    expected = take(stream(source, num_workers=2), 5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert_equal(take(stream(source, num_workers=2), 5), expected)


def test_it_can_be_sent_to_another_process(make_source):
    latents = stream(make_source())
    expected = take(latents, 4)
    assert_equal(take(pickle.loads(pickle.dumps(latents)), 4), expected)


def test_the_source_knows_what_it_holds(make_source):
    source = make_source(left_out=[2], statistics=(0.5, 2.0))
    assert len(source) == source.num_rows == 60 and source.latent_shape == SHAPE and source.num_views == 2
    assert source.num_classes == 3 and source.id2label == {0: "a", 1: "b", 2: "c"}
    assert source.statistics["scalar"] == {"latents_mean": 0.5, "latents_std": 2.0}
    assert source.metadata["tokenizer"] == {"digest": "encoder"} and source.metadata["num_left_out"] == 1
    assert source.chunk_sizes.sum() == 60 and source.chunk_sizes.max() == 4


def test_a_cache_may_be_moved(make_source, tmp_path):
    expected = take(stream(make_source()), 3)
    (tmp_path / "cache").rename(tmp_path / "moved")
    assert_equal(take(stream(open_latents(str(tmp_path / "moved"))), 3), expected)


def test_an_unfinished_cache_is_refused(make_source, tmp_path):
    make_source()
    (tmp_path / "cache" / "latents.json").unlink()
    with pytest.raises(ValueError, match="has no file latents.json, which a complete cache of latents has"):
        open_latents(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_files_that_were_lost_or_cut_off_are_noticed_at_once(make_source, tmp_path, damage):
    make_source()
    path = tmp_path / "cache" / "data" / "train-00002-of-00004.parquet"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1 of 4 files .*data/train-00002-of-00004.parquet first: copy"):
        open_latents(tmp_path / "cache")


def test_another_format_is_refused(make_source, tmp_path):
    make_source()
    path = tmp_path / "cache" / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match="has the format 2 and this version of the library reads 1"):
        open_latents(tmp_path / "cache")


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"There is no folder {tmp_path}/nothing"):
        open_latents(tmp_path / "nothing")


def test_a_revision_of_a_local_folder_is_refused(make_source, tmp_path):
    make_source()
    with pytest.raises(ValueError, match="`revision='main'` has no meaning"):
        open_latents(tmp_path / "cache", revision="main")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 16}, "has 61 rows, fewer than one global batch of 64"),
        ({"num_streams": 3, "num_workers": 2}, "`num_streams=3` must be a multiple"),
        ({"latents_mean": 0.0}, "`latents_mean` and `latents_std` belong together"),
        ({"latents_mean": [0.0, 1.0], "latents_std": 1.0}, "one for each of the 3 channels"),
        ({"latents_mean": 0.0, "latents_std": float("nan")}, "must be a finite number"),
        ({"latents_mean": 0.0, "latents_std": 0.0}, "`latents_std` must be positive"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make_source, settings, message):
    with pytest.raises(ValueError, match=message):
        stream(make_source(), **settings)


def test_flips_need_the_mirrored_view(make_source):
    source = make_source(num_views=1)
    with pytest.raises(ValueError, match="of unmirrored images only: cache them with `--random_flip true`"):
        stream(source)
    assert views_of(take(stream(source, random_flip=False), 1)[0]) == [0, 0]


def test_images_are_no_latents(tmp_path):
    with pytest.raises(ValueError, match="`source` must be a `LatentSource`"):
        stream(object())
