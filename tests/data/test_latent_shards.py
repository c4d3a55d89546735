"""Shards are whole or absent, hold what was put in, and are read by `datasets` like any parquet file."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from maetok_hf.data import LatentLayout, ShardWriter, read_shard
from tests.data.latent_caches import SETTINGS, SHAPE, labels, values, write_cache, write_shard


def layout_of(num_images=61, **settings):
    return LatentLayout(num_images, *SHAPE, **{"num_views": 2, "dtype": "float16", "rows_per_shard": 16} | settings)


def test_shards_are_consecutive_ranges_of_all_rows():
    layout = layout_of()
    assert layout.num_shards == 4
    assert [list(layout.rows(shard)) for shard in range(4)] == [
        list(range(start, min(start + 16, 61))) for start in range(0, 61, 16)
    ]
    assert layout.file(3) == "data/train-00003-of-00004.parquet"


@pytest.mark.parametrize(
    ("shape", "dtype", "num_views", "rows"),
    [((128, 32), "float16", 2, 16384), ((128, 32), "float32", 1, 16384), ((256, 768), "float16", 2, 256)],
)
def test_a_shard_is_at_most_256_mib_by_default(shape, dtype, num_views, rows):
    layout = LatentLayout(10**6, *shape, num_views, dtype)
    assert layout.rows_per_shard == rows and 2**27 < rows * layout.row_bytes <= 2**28


def test_row_groups_are_small_and_full_whatever_the_batches(tmp_path):
    layout = layout_of(200, rows_per_shard=150)
    assert layout.rows_per_group == 64 and LatentLayout(9, 128, 32, 2, "float16").rows_per_group == 32
    for batch_size in (7, 100):
        write_shard(tmp_path, layout, 0, batch_size=batch_size)
        footer = pq.read_metadata(tmp_path / layout.file(0))
        assert [footer.row_group(k).num_rows for k in range(footer.num_row_groups)] == [64, 64, 22]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_reads_all_rows_once_with_names_of_classes(tmp_path, dtype, streaming):
    write_cache(tmp_path / "cache", left_out=[4, 40], unlabeled=[6], dtype=dtype)
    data = datasets.load_dataset(
        str(tmp_path / "cache"), split="train", streaming=streaming, cache_dir=str(tmp_path / "hf")
    )
    rows = list(data)
    assert [row["index"] for row in rows] == [row for row in range(61) if row not in (4, 40)]
    for row in rows:
        expected = values([row["index"]], dtype=dtype)[:, 0].reshape(2, -1)
        assert row["latent"] == expected[0].tolist() and row["latent_mirrored"] == expected[1].tolist()
        assert row["label"] == (None if row["index"] == 6 else row["index"] % 3)
    assert data.features["label"].names == ["a", "b", "c"]
    tensor = next(iter(data.with_format("torch")))["latent"]
    assert tensor.shape == (6,) and tensor.is_floating_point()


def test_parquet_builder_reads_the_files_of_a_folder(tmp_path):
    write_cache(tmp_path / "cache", num_views=1, class_names=None)
    data = datasets.load_dataset("parquet", data_dir=str(tmp_path / "cache" / "data"), split="train", streaming=True)
    assert data.column_names == ["latent", "label", "index"]
    assert [row["label"] for row in data] == labels(range(61)).tolist()


def test_the_same_rows_make_the_same_file(tmp_path):
    layout = layout_of()
    for folder, batch_size in (("one", 3), ("two", 16)):
        write_shard(tmp_path / folder, layout, 1, batch_size=batch_size)
    one, two = ((tmp_path / folder / layout.file(1)).read_bytes() for folder in ("one", "two"))
    assert one == two


def test_an_unfinished_shard_leaves_nothing(tmp_path):
    layout = layout_of()
    write_shard(tmp_path, layout, 0, finish=False)
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, layout, 1, SETTINGS) as writer:
        writer.add(values(range(3)), labels(range(3)), np.arange(3))
        assert list((tmp_path / "data").iterdir()), "the temporary file"
        raise RuntimeError("stop")
    assert list((tmp_path / "data").iterdir()) == []
    assert read_shard(tmp_path, layout, 0, SETTINGS) is None


def test_a_shard_says_what_it_was_given(tmp_path):
    layout = layout_of()
    write_shard(tmp_path, layout, 2, left_out=[33, 40], unlabeled=[34])
    facts = read_shard(tmp_path, layout, 2, SETTINGS)
    size = (tmp_path / layout.file(2)).stat().st_size
    assert facts == {
        "settings": SETTINGS, "shard": 2, "left_out": [33, 40], "num_unlabeled": 1, "num_rows": 14, "num_bytes": size,
    }  # fmt: skip


def test_numbers_in_the_facts_are_kept_exactly(tmp_path):
    layout, number = layout_of(3), 0.1 + 0.2
    with ShardWriter(tmp_path, layout, 0, SETTINGS) as writer:
        writer.add(values(range(3)), labels(range(3)), np.arange(3))
        writer.finish(left_out=[], statistics=[[number]])
    assert read_shard(tmp_path, layout, 0, SETTINGS)["statistics"] == [[number]]


def test_damaged_and_foreign_shards_count_as_missing(tmp_path):
    layout = layout_of()
    write_shard(tmp_path, layout, 1)
    path = tmp_path / layout.file(1)
    assert read_shard(tmp_path, layout, 1, SETTINGS) is not None
    assert read_shard(tmp_path, layout, 1, "other") is None
    path.rename(tmp_path / layout.file(2))
    assert read_shard(tmp_path, layout, 2, SETTINGS) is None, "the rows of another shard"
    (tmp_path / layout.file(2)).rename(path)
    path.write_bytes(path.read_bytes()[:-20])
    assert read_shard(tmp_path, layout, 1, SETTINGS) is None
    with ShardWriter(tmp_path, layout, 1, SETTINGS) as writer:
        writer.finish(left_out=[])
    assert read_shard(tmp_path, layout, 1, SETTINGS) is None, "rows are missing"
    pq.write_table(pq.read_table(path), path)
    assert read_shard(tmp_path, layout, 1, SETTINGS) is None, "a file of other origin"


def test_a_shard_without_usable_rows_is_a_shard(tmp_path):
    write_cache(tmp_path / "cache", num_images=20, left_out=range(16, 20))
    data = datasets.load_dataset(str(tmp_path / "cache"), split="train", streaming=True)
    assert [row["index"] for row in data] == list(range(16))


def test_latents_of_another_shape_or_type_are_refused(tmp_path):
    with ShardWriter(tmp_path, layout_of(), 0, SETTINGS) as writer:
        for wrong in (values(range(2))[:1], values(range(3)), values(range(2), dtype="float32")):
            with pytest.raises(ValueError, match=r"float16 of shape \(2, 2, 2, 3\), got float"):
                writer.add(wrong, labels(range(2)), np.arange(2))


def test_unknown_types_and_sizes_are_refused():
    with pytest.raises(ValueError, match="`dtype` must be one of 'float16', 'float32', got 'bfloat16'"):
        layout_of(dtype="bfloat16")
    with pytest.raises(ValueError, match="`rows_per_shard` must be an integer of at least 1"):
        layout_of(rows_per_shard=0)


def test_half_precision_survives_bit_for_bit(tmp_path):
    layout = layout_of(1000, rows_per_shard=1000, num_views=1)
    stored = torch.randn(1, 1000, *SHAPE, generator=torch.Generator().manual_seed(0)).half().numpy()
    with ShardWriter(tmp_path, layout, 0, SETTINGS) as writer:
        writer.add(stored, labels(range(1000)), np.arange(1000))
        writer.finish(left_out=[], num_unlabeled=0)
    column = pq.read_table(tmp_path / layout.file(0)).column("latent").combine_chunks()
    assert np.array_equal(column.flatten().to_numpy().view(np.uint16), stored.reshape(-1).view(np.uint16))
