"""Small caches of latents whose values say where they come from."""

import json

import numpy as np

from maetok_hf.data import LatentLayout, ShardWriter, describe_shards, read_shard


SHAPE = (2, 3)
SETTINGS = "digest"


def values(rows, num_views=2, dtype="float16"):
    """Latents of rows: of shape (num_views, n, 2, 3), all different, and below row 256 exact in float16."""
    plain = np.asarray(rows, dtype=dtype)[:, None, None] + np.arange(6).reshape(2, 3) / 8
    return np.stack([plain, -1 - plain][:num_views]).astype(dtype)


def features(rows, num_views=2, feature_dim=5):
    """Features of rows: float16 of shape (num_views, n, 2, feature_dim), all different below row 256."""
    plain = np.asarray(rows, dtype="float16")[:, None, None] + np.arange(2 * feature_dim).reshape(2, -1) / 16
    return np.stack([plain, -2 - plain][:num_views]).astype("float16")


def labels(rows, unlabeled=()):
    return np.array([-1 if row in unlabeled else row % 3 for row in rows], dtype=np.int64)


def write_shard(folder, layout, shard, left_out=(), unlabeled=(), batch_size=5, finish=True):
    rows = [row for row in layout.rows(shard) if row not in left_out]
    with ShardWriter(folder, layout, shard, SETTINGS) as writer:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            columns = [values(part, layout.num_views, layout.dtype), labels(part, unlabeled), np.array(part)]
            if layout.feature_dim is not None:
                columns.append(features(part, layout.num_views, layout.feature_dim))
            writer.add(*columns)
        if finish:
            writer.finish(
                left_out=sorted(set(layout.rows(shard)) & set(left_out)),
                num_unlabeled=len(set(rows) & set(unlabeled)),
            )


def write_cache(folder, num_images=61, left_out=(), unlabeled=(), statistics=(0.0, 1.0), **settings):
    """A complete cache in shards of 16 images, and its layout."""
    settings = {"num_views": 2, "dtype": "float16", "rows_per_shard": 16, "class_names": ("a", "b", "c")} | settings
    layout = LatentLayout(num_images, *SHAPE, **settings)
    for shard in range(layout.num_shards):
        write_shard(folder, layout, shard, left_out, unlabeled)
    shards = [read_shard(folder, layout, shard, SETTINGS) for shard in range(layout.num_shards)]
    scalar = dict(zip(("latents_mean", "latents_std"), statistics, strict=True))
    metadata = {"format_version": 1, "statistics": {"scalar": scalar}, "tokenizer": {"digest": "encoder"}}
    metadata["resolution"] = 16
    if layout.feature_dim is not None:
        metadata["alignment"] = {"digest": "teacher"}
    (folder / "latents.json").write_text(json.dumps(metadata | describe_shards(layout, shards)))
    return layout
