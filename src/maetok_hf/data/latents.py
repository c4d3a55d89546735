"""Cached latents of a data set, streamed in the same way as its images."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..seeding import keyed_seed
from .columns import ImageColumns
from .explain import opening, reading
from .latent_shards import FEATURE_DTYPE, FEATURE_VIEWS, FORMAT_VERSION, METADATA_FILE, VIEWS
from .loader import WorkerLoader
from .micro_batches import EpochStream, MicroBatches
from .opening import resolve_folder
from .order import EpochOrder
from .sources import ParquetSource, open_binary


logger = logging.getLogger(__name__)


class LatentRows(NamedTuple):
    """
    Rows of a cache.

    Args:
        latents (`np.ndarray`): Raw values of shape `(num_views, n, num_tokens * num_channels)`, in the stored type.
        labels (`np.ndarray`): int64 of shape `(n,)`, -1 for a missing label.
        indices (`np.ndarray`): int64 of shape `(n,)`, the rows of the data set of images.
        features (`np.ndarray`, *optional*): float16 of shape `(num_views, n, num_tokens * feature_dim)`, if they are
            asked for.
    """

    latents: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    features: np.ndarray | None = None


class LatentSource:
    """
    The rows of a cache of latents, by chunk. Made by [`open_latents`].

    Args:
        folder (`str`): Path or URL of the cache.
        metadata (`Mapping[str, Any]`): The contents of its `latents.json`.
        description (`str`): What it is, for messages.
        token (`str` or `bool`, *optional*): Token for files on the Hub.

    Attributes:
        metadata (`dict[str, Any]`): The contents of `latents.json`, such as `tokenizer` (with its `digest`),
            `resolution`, `num_left_out`.
        statistics (`dict[str, dict]`): `latents_mean` and `latents_std` over all rows and views: numbers under
            `"scalar"`, lists with one for each channel under `"channel"`.
        num_rows (`int`): Rows, each of one image.
        latent_shape (`tuple[int, int]`): Tokens and channels.
        num_views (`int`): 1, or 2 with the mirrored images.
        feature_dim (`int`, *optional*): Features of each token, `None` if the cache has none.
    """

    sequential = False

    def __init__(self, folder: str, metadata: Mapping[str, Any], description: str, token: str | bool | None = None):
        self.metadata = dict(metadata)
        self.description = description
        names, group = metadata["class_names"], metadata["rows_per_group"]
        self.columns = ImageColumns(VIEWS[0], "label", None if names is None else tuple(names))
        sizes = [shard["num_rows"] for shard in metadata["shards"]]
        groups = [[min(group, size - start) for start in range(0, size, group)] for size in sizes]
        files = [f"{folder}/{shard['file']}" for shard in metadata["shards"]]
        self._files = ParquetSource(files, groups, description, self.columns, chunk_size=1, token=token)
        self.num_rows = self._files.num_rows
        self.chunk_shards = self._files.chunk_shards
        self.chunk_sizes = self._files.chunk_sizes
        self.chunk_starts = self._files.chunk_starts
        self.statistics = metadata["statistics"]
        self.latent_shape = (metadata["num_tokens"], metadata["num_channels"])
        self.num_views = metadata["num_views"]
        self.feature_dim = metadata.get("feature_dim")

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"LatentSource({self.description!r}, num_rows={self.num_rows}, latent_shape={self.latent_shape})"

    @property
    def num_classes(self) -> int | None:
        """Number of classes, `None` if the data set does not say."""
        return self.columns.num_classes

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by index, `None` if the data set does not say."""
        return self.columns.id2label

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a cache the same one, wherever it lies, in plain values."""
        names = ("resolution", "num_rows", "num_views", "dtype", "class_names", "rows_per_group", "statistics")
        return {name: self.metadata[name] for name in names} | {"encoder": self.metadata["tokenizer"]["digest"]}

    def read_chunk(self, chunk: int, num_views: int) -> LatentRows:
        """
        Args:
            chunk (`int`): Number of a chunk.
            num_views (`int`): Views to read.

        Returns:
            [`LatentRows`]: Its rows, `chunk_sizes[chunk]` of them, without features.
        """
        table = self._files.read_table(chunk, [*VIEWS[:num_views], "label", "index"]).combine_chunks()
        labels = table.column("label").fill_null(-1).to_numpy()
        return LatentRows(np.stack(_lists(table, VIEWS[:num_views])), labels, table.column("index").to_numpy())

    def read_labels(self, chunk: int) -> np.ndarray:
        """
        Args:
            chunk (`int`): Number of a chunk.

        Returns:
            `np.ndarray`: int64 of shape `(chunk_sizes[chunk],)`, -1 for a missing label; no latents are read for them.
        """
        return self._files.read_table(chunk, ["label"]).column("label").combine_chunks().fill_null(-1).to_numpy()

    def read_features(self, chunk: int, num_views: int) -> list[np.ndarray]:
        """
        Args:
            chunk (`int`): Number of a chunk.
            num_views (`int`): Views to read.

        Returns:
            `list[np.ndarray]`: For each view the features of its rows, float16 of shape
            `(chunk_sizes[chunk], num_tokens * feature_dim)`.
        """
        columns = FEATURE_VIEWS[:num_views]
        return _lists(self._files.read_table(chunk, list(columns)).combine_chunks(), columns)


def _lists(table: Any, columns: Sequence[str]) -> list[np.ndarray]:
    """Columns of lists of a fixed length, each as an array of shape `(rows, length)`."""
    return [table.column(name).chunk(0).flatten().to_numpy().reshape(len(table), -1) for name in columns]


def _find_folder(path: str, revision: str | None, token: str | bool | None) -> str:
    """A local cache as it is, of one on the Hub the URL with its commit."""
    if os.path.isdir(path):
        return path
    from datasets import load_dataset_builder

    files = load_dataset_builder(path, revision=revision, token=token).config.data_files or {}
    first = next((file for split in files.values() for file in split), "")
    return first.rpartition("/data/")[0]


def _check_files(folder: str, shards: Sequence[Mapping[str, Any]], token: str | bool | None) -> None:
    import fsspec

    options = {"token": token} if folder.startswith("hf://") and token is not None else {}
    file_system, path = fsspec.core.url_to_fs(f"{folder}/data", **options)
    sizes = {os.path.basename(entry["name"]): entry["size"] for entry in file_system.ls(path, detail=True)}
    wrong = [shard["file"] for shard in shards if sizes.get(os.path.basename(shard["file"])) != shard["num_bytes"]]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(shards)} files in {folder} are missing or have another size than when they were "
            f"written, {wrong[0]} first: copy the folder again."
        )


def open_latents(
    data: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None
) -> LatentSource:
    """
    Open a cache of latents for [`StreamingLatents`]. Nothing is downloaded as a whole, and no row is read.

    Args:
        data (`str` or `os.PathLike`): Folder that `examples/cache_latents.py` has filled, or a data set on the Hub
            with the same files.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Token for private and gated data sets; by default the one of
            `hf auth login`.

    Returns:
        [`LatentSource`]: The rows; it knows `num_rows`, `latent_shape`, `statistics` and `metadata`.

    Raises:
        ValueError: If it is no such folder, an unfinished one, or files are missing or cut off.
        OSError: If it does not exist, is gated or cannot be reached.
    """
    path = resolve_folder(data)
    if os.path.isdir(path) and revision is not None:
        raise ValueError(f"`revision={revision!r}` has no meaning for the local folder {path}: remove it.")
    with opening(path):
        folder = _find_folder(path, revision, token)
        try:
            with open_binary(f"{folder}/{METADATA_FILE}", token) as file:
                metadata = json.load(file)
        except FileNotFoundError:
            raise ValueError(
                f"`data` {path!r} has no file {METADATA_FILE}, which a complete cache of latents has: give the folder "
                "that examples/cache_latents.py has filled, or run its command again until it says that all latents "
                "are there."
            ) from None
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{METADATA_FILE} of {path!r} has the format {metadata.get('format_version')!r} and this version of "
                f"the library reads {FORMAT_VERSION}: cache the latents again, or use the version that wrote them."
            )
        _check_files(folder, metadata["shards"], token)
    return LatentSource(folder, metadata, f"the latents in {path!r}", token)


class StreamingLatents(MicroBatches):
    """
    Endless, resumable stream of micro-batches of cached latents; the loader of a generator's training loop.

    Rows come in the same kind of order as the images of [`StreamingImages`], and all that is said there of epochs,
    streams, processes, workers, accumulation and restarts holds here. Each micro-batch is a dict:

    - `latents` (`torch.Tensor`): float32 of shape `(batch_size, num_tokens, num_channels)`, normalised:
      `(latents - latents_mean) / latents_std`.
    - `class_labels` (`torch.Tensor`): int64 of shape `(batch_size,)`, -1 for a missing label.
    - `indices` (`torch.Tensor`): int64 of shape `(batch_size,)`, the row of each sample in the data set of images.
      Together with `epoch` it keys every further draw for the sample.
    - `replaced` (`torch.Tensor`): bool of shape `(batch_size,)`, `True` where a row has no label although
      `require_labels`, and another row of the same block stands in for it.
    - `epoch` (`int`): The epoch, from 0.
    - `token_features` (`torch.Tensor`), if they are asked for: float16 of shape
      `(batch_size, num_tokens, feature_dim)`, as they are stored, of the same view as the latents.

    Args:
        source ([`LatentSource`]): The cache, from [`open_latents`].
        batch_size (`int`): Latents of a micro-batch (per process and accumulation step).
        seed (`int`): Seed of the order and the flips.
        random_flip (`bool`, *optional*, defaults to `True`): Take the latents of the mirrored image with probability
            one half, drawn for (seed, epoch, index).
        latents_mean (`float` or `list[float]`, *optional*): Mean to subtract, one number or one for each channel; by
            default that of all values of the cache. A tokenizer that has its own, such as a trained `AutoencoderMAE`
            in its config, must get these, since they are undone before it decodes.
        latents_std (`float` or `list[float]`, *optional*): Standard deviation to divide by, given with `latents_mean`.
        shuffle (`bool`, *optional*, defaults to `True`): `False` keeps the order of the data set.
        block_size (`int`, *optional*, defaults to 2048): Rows that are shuffled together. Each stream holds one block
            in memory, and a restart reads at most one block a stream again.
        rank (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): Micro-batches a process takes per step.
        num_workers (`int`, *optional*, defaults to 0): Data workers of this process.
        num_streams (`int`, *optional*): Number of streams, a multiple of `world_size * max(1, num_workers)`, which is
            the default.
        start_micro_batch (`int`, *optional*, defaults to 0): Micro-batches this process has consumed since the start
            of the run.
        require_labels (`bool`, *optional*, defaults to `False`): Whether every sample needs a class.
        with_features (`bool`, *optional*, defaults to `False`): Give the features that the cache has beside its
            latents; they are not read otherwise. A block of 2048 rows of two views then takes 0.8 GB at 128 tokens of
            768 features, and a stream never holds more than that one block of them.

    Attributes:
        micro_batches_per_epoch (`int`): Micro-batches of this process in an epoch.
        num_dropped (`int`): Rows that an epoch leaves out.

    Raises:
        ValueError: If an argument is out of range or does not fit the cache, if `num_streams` does not fit, or if
            there are fewer rows than one global batch.
    """

    def __init__(
        self,
        source: LatentSource,
        *,
        batch_size: int,
        seed: int,
        random_flip: bool = True,
        latents_mean: float | Sequence[float] | None = None,
        latents_std: float | Sequence[float] | None = None,
        shuffle: bool = True,
        block_size: int = 2048,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        num_workers: int = 0,
        num_streams: int | None = None,
        start_micro_batch: int = 0,
        require_labels: bool = False,
        with_features: bool = False,
    ):
        if not isinstance(source, LatentSource):
            raise ValueError(f"`source` must be a `LatentSource`, got {type(source)}: make one with `open_latents`.")
        if random_flip and source.num_views == 1:
            raise ValueError(
                f"`random_flip=True`, but {source.description} are of unmirrored images only: cache them with "
                "`--random_flip true`, or pass `random_flip=False`."
            )
        if with_features and source.feature_dim is None:
            raise ValueError(
                f"`with_features=True`, but {source.description} have none beside them: cache them with "
                "`--alignment_model`, or pass `with_features=False`."
            )
        self.with_features = with_features
        self.num_views = 2 if random_flip else 1
        if (latents_mean is None) != (latents_std is None):
            raise ValueError("`latents_mean` and `latents_std` belong together: give both or neither.")
        if latents_mean is None:
            latents_mean, latents_std = (source.statistics["scalar"][name] for name in ("latents_mean", "latents_std"))
        self.latents_mean = _statistic("latents_mean", latents_mean, source.latent_shape[1])
        self.latents_std = _statistic("latents_std", latents_std, source.latent_shape[1])
        if not (self.latents_std > 0).all():
            raise ValueError(f"`latents_std` must be positive, got {latents_std}.")
        num_labeled = source.num_rows - source.metadata["num_unlabeled"]
        if require_labels and num_labeled == 0:
            raise ValueError(f"`require_labels=True`, but {source.description} have no labels at all.")
        if require_labels and num_labeled < source.num_rows:
            logger.warning(
                "%d of %d rows of %s have no label; others stand in for them.",
                source.num_rows - num_labeled, source.num_rows, source.description,
            )  # fmt: skip
        self.require_labels = require_labels
        super().__init__(
            source,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            block_size=block_size,
            rank=rank,
            world_size=world_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            num_workers=num_workers,
            num_streams=num_streams,
            start_micro_batch=start_micro_batch,
        )

    def dataloader(self, pin_memory: bool = False, prefetch_factor: int | None = None) -> torch.utils.data.DataLoader:
        """
        A loader with this data set's number of workers that yields its micro-batches in order.

        Its workers outlive SIGINT and SIGTERM, like those of [`StreamingImages`].

        Args:
            pin_memory (`bool`, *optional*, defaults to `False`): Copy batches to pinned memory, for faster transfer to
                a GPU.
            prefetch_factor (`int`, *optional*): Micro-batches that each worker prepares in advance; torch's default
                is 2.

        Returns:
            `torch.utils.data.DataLoader`: The loader. Its iterator is endless.
        """
        loader = _LatentLoader(self, self.num_workers, prefetch_factor)
        loader.pin_memory = pin_memory
        return loader

    @property
    def identity(self) -> dict[str, Any]:
        """What makes the samples the same ones: the cache and, if they are asked for, the model of the features."""
        if not self.with_features:
            return self.source.identity
        return self.source.identity | {"features": self.source.metadata["alignment"]["digest"]}

    def open_stream(self, order: EpochOrder, epoch: int) -> "_LatentStream":
        return _LatentStream(self, order, epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _, _, stream, start in self.walk():
            with reading(self.source.description):
                batch = stream.micro_batch(start)
            yield batch if torch.utils.data.get_worker_info() is None else _pack(batch)

    def normalize(self, latents: np.ndarray) -> torch.Tensor:
        """Stored values, `(n, num_tokens * num_channels)`, as normalised float32, `(n, num_tokens, num_channels)`."""
        values = torch.from_numpy(latents).float().view(len(latents), *self.source.latent_shape)
        return values.sub_(self.latents_mean).div_(self.latents_std)


class _LatentLoader(WorkerLoader):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_unpack, super().__iter__())


def _pack(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as a worker sends it: torch would pass each of the small tensors by a connection of its own."""
    as_they_are = ("latents", "token_features", "epoch")
    return {name: value if name in as_they_are else value.numpy() for name, value in batch.items()}


def _unpack(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def _statistic(name: str, value: float | Sequence[float], num_channels: int) -> torch.Tensor:
    statistic = torch.as_tensor(value, dtype=torch.float32)
    if statistic.ndim > 1 or statistic.numel() not in (1, num_channels) or not statistic.isfinite().all():
        raise ValueError(
            f"`{name}` must be a finite number or one for each of the {num_channels} channels, got {value}."
        )
    return statistic


class _LatentStream(EpochStream):
    """One stream of latents."""

    def __init__(self, latents: StreamingLatents, order: EpochOrder, epoch: int):
        super().__init__(latents, order, epoch)
        self.latents = latents
        self.rows: LatentRows | None = None
        self.places = np.empty(0, dtype=np.int64)  # of the rows in their order
        self.substitute: LatentRows | None = None  # for all rows of a block without a label

    def read_block(self, block: int) -> tuple[LatentRows, np.ndarray]:
        """The rows of a block as they are stored, and their places in the order of this epoch."""
        num_views = self.latents.num_views
        chunks = [self.latents.source.read_chunk(chunk, num_views) for chunk in self.chunks_of(block)]
        latents, labels, indices, _ = zip(*chunks, strict=True)
        rows = LatentRows(np.concatenate(latents, axis=1), np.concatenate(labels), np.concatenate(indices))
        if self.latents.with_features:
            rows = rows._replace(features=self.read_features(block))
        return rows, self.row_order(block)

    def read_features(self, block: int) -> np.ndarray:
        """The features of a block as they are stored; they are large, so they are in memory once only."""
        source, num_views, chunks, stop = self.latents.source, self.latents.num_views, self.chunks_of(block), 0
        num_rows = int(source.chunk_sizes[chunks].sum())
        features = np.empty((num_views, num_rows, source.latent_shape[0] * source.feature_dim), dtype=FEATURE_DTYPE)
        for chunk in chunks:
            start, stop = stop, stop + source.chunk_sizes[chunk]
            for view, values in enumerate(source.read_features(chunk, num_views)):
                features[view, start:stop] = values
        return features

    def load(self, block: int) -> None:
        self.rows = self.substitute = None  # the memory is free before the next block is read
        self.rows, self.places = self.read_block(block)

    def micro_batch(self, start: int) -> dict[str, Any]:
        """The samples at positions `start`, `start + 1`, ... of the epoch's rows."""
        latents, stop = self.latents, start + self.latents.batch_size
        parts = []
        while start < stop:
            offset = self.offset_of(start)
            count = min(stop - start, len(self.places) - offset)
            parts.append(self.take(offset, count))
            start += count
        values, labels, indices, replaced, *features = (np.concatenate(part) for part in zip(*parts, strict=True))
        batch = {
            "latents": latents.normalize(values),
            "class_labels": torch.from_numpy(labels),
            "indices": torch.from_numpy(indices),
            "replaced": torch.from_numpy(replaced),
            "epoch": self.epoch,
        }
        if features:
            shape = (len(values), latents.source.latent_shape[0], latents.source.feature_dim)
            batch["token_features"] = torch.from_numpy(features[0]).view(shape)
        return batch

    def take(self, offset: int, count: int) -> tuple[np.ndarray, ...]:
        """
        Values, labels, indices, replacements and, if they are asked for, features of `count` rows from `offset` on in
        the current block.
        """
        places = self.places[offset : offset + count]
        labels, indices = self.rows.labels[places], self.rows.indices[places]
        views = self.views(indices)
        values = self.rows.latents[views, places]
        features = () if self.rows.features is None else (self.rows.features[views, places],)
        replaced = (labels < 0) & self.latents.require_labels
        for number in np.flatnonzero(replaced).tolist():
            rows, place = self.stand_in(offset + number)
            values[number], labels[number] = rows.latents[views[number], place], rows.labels[place]
            if features:
                features[0][number] = rows.features[views[number], place]
        return values, labels, indices, replaced, *features

    def views(self, indices: np.ndarray) -> np.ndarray:
        """Which view of each row this epoch shows."""
        if self.latents.num_views == 1:
            return np.zeros(len(indices), dtype=np.int64)
        seed = self.latents.seed
        # One bit of the key's hash is the draw: a generator would take ten times as long to give as good a bit.
        return np.array([keyed_seed(seed, "flip", self.epoch, index) & 1 for index in indices.tolist()])

    def stand_in(self, offset: int) -> tuple[LatentRows, int]:
        """The first row with a label after `offset` in the current block (round the block), then in the next ones."""
        places = np.roll(self.places, -offset)
        found = np.flatnonzero(self.rows.labels[places] >= 0)
        if len(found):
            return self.rows, int(places[found[0]])
        if self.substitute is None:
            self.substitute = self.read_substitute()
        return self.substitute, 0

    def read_substitute(self) -> LatentRows:
        """
        The first row with a label in the next blocks, by itself. Of these nothing else is kept, and beside labels
        only the row's chunk is read: a second block of features would take as much memory as the current one.
        """
        source, num_views = self.latents.source, self.latents.num_views
        for step in range(1, self.order.num_blocks):
            block = (self.block + step) % self.order.num_blocks
            chunks = self.chunks_of(block)
            places = self.row_order(block)
            found = np.flatnonzero(np.concatenate([source.read_labels(chunk) for chunk in chunks])[places] >= 0)
            if not len(found):
                continue
            place, ends = places[found[0]], np.cumsum(source.chunk_sizes[chunks])
            number = int(np.searchsorted(ends, place, side="right"))
            chunk, row = chunks[number], int(place - ends[number])  # counted from the chunk's end
            latents, labels, indices, _ = source.read_chunk(chunk, num_views)
            substitute = LatentRows(latents[:, [row]], labels[[row]], indices[[row]])
            if self.latents.with_features:
                features = [values[[row]] for values in source.read_features(chunk, num_views)]
                substitute = substitute._replace(features=np.stack(features))
            return substitute
        raise AssertionError("some row has a label")
