"""Features beside cached latents: of the same view, stored once, and no burden for who does not ask for them."""

import itertools

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from maetok_hf.data import LatentLayout, LatentSource, ShardWriter, StreamingLatents, open_latents
from maetok_hf.data.sources import ParquetSource
from tests.data.latent_caches import SETTINGS, SHAPE, features, labels, values, write_cache


# 61 rows, global batches of 8: 28 micro-batches of 2 an epoch.
STREAM = {"batch_size": 2, "seed": 5, "block_size": 16, "num_streams": 4, "gradient_accumulation_steps": 4}
MICRO_BATCHES = 28


@pytest.fixture
def make_source(tmp_path, monkeypatch):
    monkeypatch.setattr("maetok_hf.data.latent_shards._GROUP_ROWS", 4)

    def make(name="cache", **settings):
        write_cache(tmp_path / name, **{"feature_dim": 5} | settings)
        return open_latents(tmp_path / name)

    return make


def take(source, count=2 * MICRO_BATCHES, **settings):
    return list(itertools.islice(StreamingLatents(source, **STREAM | settings).dataloader(), count))


def columns_read(monkeypatch):
    """Names of the columns that are read from now on."""
    read, inner = set(), ParquetSource.read_table

    def read_table(self, chunk, names):
        read.update(names)
        return inner(self, chunk, names)

    monkeypatch.setattr(ParquetSource, "read_table", read_table)
    return read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_features_are_those_of_the_view_that_is_drawn(make_source, num_workers):
    seen = set()
    for batch in take(make_source(), with_features=True, num_workers=num_workers):
        rows = batch["indices"].numpy()
        views = (batch["latents"].flatten(1)[:, 0].numpy() < 0).astype(int)  # mirrored ones are negative
        places = np.arange(len(rows))
        assert np.array_equal(batch["latents"].numpy(), values(rows, dtype="float32")[views, places])
        assert batch["token_features"].dtype == torch.float16 and batch["token_features"].shape == (2, 2, 5)
        assert np.array_equal(batch["token_features"].numpy(), features(rows)[views, places])
        seen |= set(views.tolist())
    assert seen == {0, 1}


def test_a_row_that_stands_in_for_another_brings_its_own_features(make_source):
    source = make_source(unlabeled=[*range(16, 32), 3, 40])
    replaced = 0
    for batch in take(source, with_features=True, require_labels=True, random_flip=False):
        # the first latent of a row and the first feature of its first token are both its number
        assert torch.equal(batch["latents"][:, 0, 0], batch["token_features"][:, 0, 0].float())
        assert (batch["latents"][:, 0, 0].long() % 3).tolist() == batch["class_labels"].tolist()
        replaced += int(batch["replaced"].sum())
    assert replaced > 16


def test_a_stand_in_from_another_block_brings_its_own_features_and_no_second_block(make_source, monkeypatch):
    """Features are what a worker's memory goes to, so that there must never be two blocks of them."""
    chunks, inner = [], LatentSource.read_features

    def read_features(self, chunk, num_views):
        chunks.append(chunk)
        return inner(self, chunk, num_views)

    monkeypatch.setattr(LatentSource, "read_features", read_features)
    settings = {"with_features": True, "require_labels": True, "random_flip": False, "shuffle": False}
    unlabeled = [*range(16, 34), *range(48, 61)]
    take(make_source("labeled"), MICRO_BATCHES, **settings)
    num_of_blocks = len(chunks)
    chunks.clear()
    batches = take(make_source("rich", unlabeled=unlabeled), MICRO_BATCHES, **settings)
    # Blocks of 16 rows in 4 chunks, streams of 14 rows: the second block is read by two streams, the fourth by one.
    assert len(chunks) == num_of_blocks + 3
    for batch in batches:
        for number, row in enumerate(batch["indices"].tolist()):
            shown = row
            if 16 <= row < 34:
                shown = 34  # of the third block
            elif row >= 48:
                shown = 0  # the first block comes after the last one
            assert torch.equal(batch["latents"][number], torch.from_numpy(values([shown], dtype="float32")[0, 0]))
            assert np.array_equal(batch["token_features"][number].numpy(), features([shown])[0, 0])


def test_a_cache_with_features_gives_the_same_latents_and_reads_nothing_else(make_source, monkeypatch):
    plain, rich = make_source("plain", feature_dim=None), make_source("rich")
    expected, read = take(plain), columns_read(monkeypatch)
    batches = take(rich)
    assert read == {"latent", "latent_mirrored", "label", "index"}
    with_features = take(rich, with_features=True)
    assert read == {"latent", "latent_mirrored", "label", "index", "features", "features_mirrored"}
    for one, other, third in zip(expected, batches, with_features, strict=True):
        assert one.keys() == other.keys() == third.keys() - {"token_features"}
        assert all(torch.equal(one[name], other[name]) for name in one if name != "epoch")
        assert all(torch.equal(one[name], third[name]) for name in one if name != "epoch")


def test_only_the_view_that_is_needed_is_read(make_source, monkeypatch):
    source, read = make_source(), columns_read(monkeypatch)
    take(source, 4, with_features=True, random_flip=False)
    assert read == {"latent", "label", "index", "features"}


def test_any_micro_batch_can_be_the_first_after_a_restart(make_source):
    source = make_source()
    expected = take(source, with_features=True)
    for start in (1, 17, MICRO_BATCHES, MICRO_BATCHES + 5):
        again = take(source, 3, with_features=True, start_micro_batch=start)
        for one, other in zip(again, expected[start : start + 3], strict=True):
            assert torch.equal(one["token_features"], other["token_features"])


def test_features_that_are_not_there_are_refused(make_source):
    with pytest.raises(
        ValueError, match="`with_features=True`, but the latents in .* have none .*`--alignment_model`"
    ):
        take(make_source(feature_dim=None), with_features=True)


def test_samples_are_other_ones_with_features_of_another_model(make_source):
    source = make_source()
    plain, rich = (StreamingLatents(source, **STREAM, with_features=flag) for flag in (False, True))
    assert plain.identity == source.identity and rich.identity == source.identity | {"features": "teacher"}


def test_datasets_reads_the_columns(tmp_path):
    write_cache(tmp_path / "cache", feature_dim=5)
    rows = list(datasets.load_dataset(str(tmp_path / "cache"), split="train", streaming=True))
    assert len(rows) == 61
    for row in rows:
        expected = features([row["index"]])[:, 0].reshape(2, -1).tolist()
        assert [row["features"], row["features_mirrored"]] == expected


def test_a_cache_without_features_does_not_speak_of_them(tmp_path):
    layout = write_cache(tmp_path, num_images=20)
    # what is hashed into every file, so that caches begun before there were features can be continued
    assert layout.settings() == {
        "num_images": 20, "num_tokens": 2, "num_channels": 3, "num_views": 2, "dtype": "float16", "split": "train",
        "rows_per_shard": 16, "class_names": ("a", "b", "c"),
    }  # fmt: skip
    assert "feature" not in (tmp_path / "latents.json").read_text()
    file = tmp_path / layout.file(0)
    assert pq.read_schema(file).names == ["latent", "latent_mirrored", "label", "index"]
    assert b"feature_dim" not in file.read_bytes()


def test_features_count_for_files_and_room_but_not_for_what_is_read_in_one_go():
    plain, rich = (LatentLayout(10**6, 128, 32, 2, "float16", feature_dim=dim) for dim in (None, 768))
    assert rich.feature_bytes == 2 * 128 * 768 * 2 and rich.row_bytes == plain.row_bytes + rich.feature_bytes
    assert rich.rows_per_group == plain.rows_per_group and rich.rows_per_shard == 512


def test_features_must_fit_the_layout(tmp_path):
    rows = range(2)
    columns = values(rows), labels(rows), np.arange(2)
    layout = LatentLayout(2, *SHAPE, 2, "float16", feature_dim=5)
    with ShardWriter(tmp_path, layout, 0, SETTINGS) as writer:
        with pytest.raises(ValueError, match="`features` are missing, but the layout has feature_dim=5"):
            writer.add(*columns)
        for wrong in (features(rows)[:1], features(rows, feature_dim=4), features(rows).astype("float32")):
            with pytest.raises(ValueError, match=r"`features` must be float16 of shape \(2, 2, 2, 5\), got float"):
                writer.add(*columns, wrong)
    with ShardWriter(tmp_path, LatentLayout(2, *SHAPE, 2, "float16"), 0, SETTINGS) as writer:
        with pytest.raises(ValueError, match="`features` are given, but the layout has feature_dim=None"):
            writer.add(*columns, features(rows))
    with pytest.raises(ValueError, match="`feature_dim` must be an integer of at least 1"):
        LatentLayout(2, *SHAPE, 2, "float16", feature_dim=0)
