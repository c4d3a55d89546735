"""Latents of a data set on disk: parquet files that `datasets` reads like any other, each written whole or not at all.

    settings.json                       what determines the contents, before anything is encoded
    data/train-00000-of-00157.parquet   a fixed range of the data set's rows
    latents.json                        statistics and files, once all are there: a folder without it is unfinished
    README.md                           the card

A row has the columns `latent` (and `latent_mirrored`, of the mirrored image): a list of fixed length with the values
of token 0, of token 1, and so on, raw, as the tokenizer's `decode` takes them; `label`: the class, null if it is
missing; and `index`: the row's number in the data set of images. Rows whose image cannot be decoded are left out and
counted, so there is one row for every other image.

A cache may also hold what a frozen vision model says of the images: the columns `features` (and `features_mirrored`),
float16, with the vector of token 0, of token 1, and so on.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .batches import check_integer


VIEWS = ("latent", "latent_mirrored")
FEATURE_VIEWS = ("features", "features_mirrored")
FEATURE_DTYPE = "float16"
DTYPES = ("float16", "float32")
SETTINGS_FILE = "settings.json"
METADATA_FILE = "latents.json"
FORMAT_VERSION = 1
_FACTS_KEY = "maetok_latents"
_SHARD_BYTES = 2**28
# What is read in one go. Neighbouring rows stay together in the shuffled order, so there should be few of them.
_GROUP_BYTES = 2**19
_GROUP_ROWS = 64


@dataclass(frozen=True)
class LatentLayout:
    """
    What the files of a cache look like; a function of the data set, the tokenizer and the settings alone.

    Args:
        num_images (`int`): Rows of the data set of images.
        num_tokens (`int`): Tokens of a latent.
        num_channels (`int`): Channels of a token.
        num_views (`int`): 1, or 2 with the mirrored images.
        dtype (`str`): `"float16"` or `"float32"`.
        split (`str`, *optional*, defaults to `"train"`): Name of the split, which begins the names of the files.
        rows_per_shard (`int`, *optional*): Rows of the data set of images for each file; by default a power of two
            for files of up to 256 MiB.
        class_names (`tuple[str, ...]`, *optional*): Names of the classes, if they are known.
        feature_dim (`int`, *optional*): Features of each token, if there are any.

    Raises:
        ValueError: If `dtype` is unknown or a number is out of range.
    """

    num_images: int
    num_tokens: int
    num_channels: int
    num_views: int
    dtype: str
    split: str = "train"
    rows_per_shard: int | None = None
    class_names: tuple[str, ...] | None = None
    feature_dim: int | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(map(repr, DTYPES))}, got {self.dtype!r}.")
        if self.feature_dim is not None:
            check_integer("feature_dim", self.feature_dim, 1)
        if self.rows_per_shard is None:
            fitting = max(1, _SHARD_BYTES // self.row_bytes)
            object.__setattr__(self, "rows_per_shard", 1 << (fitting.bit_length() - 1))
        check_integer("rows_per_shard", self.rows_per_shard, 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image: its latents and features."""
        return self.latent_bytes + self.feature_bytes

    @property
    def latent_bytes(self) -> int:
        """Bytes of the latents of one image."""
        return self.num_views * self.num_tokens * self.num_channels * np.dtype(self.dtype).itemsize

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of one image."""
        return self.num_views * self.num_tokens * (self.feature_dim or 0) * np.dtype(FEATURE_DTYPE).itemsize

    @property
    def rows_per_group(self) -> int:
        """Rows of a row group; features do not count, so that they do not slow down who reads the latents alone."""
        return max(1, min(_GROUP_ROWS, _GROUP_BYTES // self.latent_bytes))

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """The rows of the data set of images that a shard is about."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.num_images))

    def file(self, shard: int) -> str:
        """Path of a shard in the folder, named so that `datasets` knows the split."""
        return f"data/{self.split}-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def schema(self) -> Any:
        """The `pyarrow.Schema` of all shards, with the features of `datasets` in its metadata."""
        from datasets import ClassLabel, Features, List, Value

        latent = List(Value(self.dtype), length=self.num_tokens * self.num_channels)
        label = Value("int64") if self.class_names is None else ClassLabel(names=list(self.class_names))
        columns = {**dict.fromkeys(VIEWS[: self.num_views], latent), "label": label, "index": Value("int64")}
        if self.feature_dim is not None:
            feature = List(Value(FEATURE_DTYPE), length=self.num_tokens * self.feature_dim)
            columns |= dict.fromkeys(FEATURE_VIEWS[: self.num_views], feature)
        return Features(columns).arrow_schema

    def settings(self) -> dict[str, Any]:
        """The layout in plain values, by which a cache is recognised; without features it does not speak of them."""
        settings = asdict(self)
        if self.feature_dim is None:
            del settings["feature_dim"]
        return settings


class ShardWriter:
    """
    Writes one shard under a temporary name, which [`~ShardWriter.finish`] changes: the file exists whole or not at
    all.

    Args:
        folder (`str` or `Path`): The cache.
        layout ([`LatentLayout`]): Its layout.
        shard (`int`): Number of the shard.
        settings (`str`): Digest of the cache's settings.
    """

    def __init__(self, folder: str | Path, layout: LatentLayout, shard: int, settings: str):
        import pyarrow.parquet as pq

        self.layout, self.shard, self.settings = layout, shard, settings
        self.path = Path(folder) / layout.file(shard)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._schema = layout.schema()
        self._writer = pq.ParquetWriter(
            self._temporary, self._schema, compression="none", use_dictionary=False, write_statistics=False
        )
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._num_waiting = self.num_rows = 0

    def add(
        self, latents: np.ndarray, labels: np.ndarray, indices: np.ndarray, features: np.ndarray | None = None
    ) -> None:
        """
        Args:
            latents (`np.ndarray`): Of shape `(num_views, n, num_tokens, num_channels)`, in the type of the layout.
            labels (`np.ndarray`): int64 of shape `(n,)`, -1 for a missing label.
            indices (`np.ndarray`): int64 of shape `(n,)`, the rows of the data set of images.
            features (`np.ndarray`, *optional*): float16 of shape `(num_views, n, num_tokens, feature_dim)`, needed
                if, and only if, the layout has a `feature_dim`.

        Raises:
            ValueError: If a shape or a type is not that of the layout.
        """
        layout, num_rows = self.layout, len(indices)
        shape = (layout.num_views, num_rows, layout.num_tokens)
        _check_array("latents", latents, (*shape, layout.num_channels), layout.dtype)
        if (features is None) != (layout.feature_dim is None):
            raise ValueError(
                f"`features` are {'missing' if features is None else 'given'}, but the layout has "
                f"feature_dim={layout.feature_dim}."
            )
        if features is None:
            features = np.empty((*shape, 0), dtype=FEATURE_DTYPE)
        else:
            _check_array("features", features, (*shape, layout.feature_dim), FEATURE_DTYPE)
        flat = (array.reshape(layout.num_views, num_rows, -1) for array in (latents, features))
        self._waiting.append((*flat, labels, indices))
        self._num_waiting += num_rows
        if self._num_waiting >= layout.rows_per_group:
            self._write(self._num_waiting // layout.rows_per_group * layout.rows_per_group)

    def _write(self, count: int) -> None:
        """The first `count` of the waiting rows, in whole row groups if there is a rest."""
        import pyarrow as pa

        def lists(views: np.ndarray) -> list[Any]:
            """One column for each view."""
            return [
                pa.FixedSizeListArray.from_arrays(pa.array(view[:count].reshape(-1)), view.shape[-1]) for view in views
            ]

        latents, features = (np.concatenate([part[k] for part in self._waiting], axis=1) for k in (0, 1))
        labels, indices = (np.concatenate([part[k] for part in self._waiting]) for k in (2, 3))
        columns = lists(latents)
        columns += [pa.array(labels[:count], mask=labels[:count] < 0), pa.array(indices[:count])]
        if self.layout.feature_dim is not None:
            columns += lists(features)
        table = pa.table(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=self.layout.rows_per_group)
        self._waiting = [(latents[:, count:], features[:, count:], labels[count:], indices[count:])]
        self._num_waiting -= count
        self.num_rows += count

    def finish(self, **facts: Any) -> None:
        """
        Complete the file and give it its name.

        Args:
            **facts (`Any`): What [`read_shard`] shall give back, in plain types, with `left_out`, the rows that have
                no usable image.
        """
        if self._num_waiting:
            self._write(self._num_waiting)
        facts |= {"settings": self.settings, "shard": self.shard}
        self._writer.add_key_value_metadata({_FACTS_KEY: json.dumps(facts)})
        self._writer.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self.path)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer.is_open:
            self._writer.close()
        self._temporary.unlink(missing_ok=True)


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"`{name}` must be {dtype} of shape {shape}, got {array.dtype} of {array.shape}.")


def read_shard(folder: str | Path, layout: LatentLayout, shard: int, settings: str) -> dict[str, Any] | None:
    """
    What a finished shard says of itself.

    Args:
        folder (`str` or `Path`): The cache.
        layout ([`LatentLayout`]): Its layout.
        shard (`int`): Number of the shard.
        settings (`str`): Digest of the cache's settings.

    Returns:
        `dict[str, Any]`, *optional*: What was given to [`~ShardWriter.finish`], with `num_rows` and `num_bytes`;
        `None` if the file is missing, damaged, or of another cache, and so must be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder) / layout.file(shard)
    if not path.is_file():
        return None
    try:
        footer = pq.read_metadata(path)
        facts = json.loads(footer.metadata[_FACTS_KEY.encode()])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None
    whole = footer.num_rows + len(facts["left_out"]) == len(layout.rows(shard))
    if not whole or (facts["settings"], facts["shard"]) != (settings, shard):
        return None
    return facts | {"num_rows": footer.num_rows, "num_bytes": path.stat().st_size}


def describe_shards(layout: LatentLayout, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    What [`open_latents`] needs to know, for `latents.json`.

    Args:
        layout ([`LatentLayout`]): The layout of the cache.
        shards (`Sequence[Mapping[str, Any]]`): What [`read_shard`] says of each shard, in order.

    Returns:
        `dict[str, Any]`: Plain values.
    """
    described = {
        "split": layout.split,
        "num_images": layout.num_images,
        "num_rows": sum(shard["num_rows"] for shard in shards),
        "num_left_out": sum(len(shard["left_out"]) for shard in shards),
        "num_unlabeled": sum(shard["num_unlabeled"] for shard in shards),
        "num_tokens": layout.num_tokens,
        "num_channels": layout.num_channels,
        "num_views": layout.num_views,
        "dtype": layout.dtype,
        "class_names": None if layout.class_names is None else list(layout.class_names),
        "rows_per_group": layout.rows_per_group,
        "shards": [
            {"file": layout.file(number), "num_rows": shard["num_rows"], "num_bytes": shard["num_bytes"]}
            for number, shard in enumerate(shards)
        ],
    }
    return described if layout.feature_dim is None else described | {"feature_dim": layout.feature_dim}
