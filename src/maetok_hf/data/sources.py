"""Random access to the undecoded rows of image data sets, whatever the format they are stored in.

A source is a list of shards with known row counts, cut into chunks: runs of consecutive rows that are cheap to read in
one go (row groups of a parquet file, a seek into a tar file). Chunks are what [`StreamingImages`] permutes.
"""

import io
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from .columns import ImageColumns
from .counts import RowWarnings
from .transforms import convert_to_rgb


logger = logging.getLogger(__name__)

NUM_THREADS = 16
MAX_OPEN_FILES = 16
MAX_OPEN_STREAMS = 64


class Row(NamedTuple):
    """
    A raw row.

    Args:
        image (`Any`): What the image column holds: bytes, a path, a dict of both, an image or `None`.
        label (`Any`, *optional*): What the label column holds, `None` without one.
        caption (`Any`, *optional*): What the caption column holds, `None` without one.
    """

    image: Any
    label: Any = None
    caption: Any = None


class Sample(NamedTuple):
    """
    A decoded row.

    Args:
        image (`PIL.Image.Image`): The image, upright and of mode `RGB`.
        label (`int`): Class index, -1 if it is missing or invalid, or no classes are read.
        caption (`str`, *optional*): The caption, `None` if it is missing or no captions are read.
        names (`tuple[str, ...]`): Names of `COUNT_NAMES` for what was unusual.
    """

    image: PIL.Image.Image
    label: int
    caption: str | None
    names: tuple[str, ...]


class CorruptImageError(ValueError):
    """The stored bytes of an image cannot be decoded, or there are none."""


def open_binary(path: str, token: str | bool | None) -> Any:
    """Open a local or remote file for reading."""
    import fsspec

    options = {"hf": {"token": token}} if "hf://" in path and token is not None else {}
    return fsspec.open(path, "rb", **options).open()


def _read_file(path: str, token: str | bool | None) -> bytes:
    try:
        with open_binary(path, token) as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        # Any other error of the file system (a lost connection) is not the image's fault and stops the run: replacing
        # the image then would make the sequence depend on the weather.
        raise CorruptImageError(f"There is no file {path!r}.") from error


def decode_image(value: Any, token: str | bool | None = None) -> tuple[PIL.Image.Image, tuple[str, ...]]:
    """
    Decode what an image column holds.

    Args:
        value (`bytes`, `str`, `dict`, `numpy.ndarray` or `PIL.Image.Image`): An encoded image, a path or URL, the
            `{"bytes", "path"}` dict of `datasets.Image`, or pixels.
        token (`str` or `bool`, *optional*): Token for files on the Hub.

    Returns:
        `tuple[PIL.Image.Image, tuple[str, ...]]`: An upright image of mode `RGB`, its pixels in memory, and the names
        of `COUNT_NAMES` for what was unusual about the stored one.

    Raises:
        CorruptImageError: If there is no image or it cannot be decoded.
    """
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str | Path):
        value = _read_file(str(value), token)
    if value is None:
        raise CorruptImageError("The row holds no image.")
    try:
        if isinstance(value, np.ndarray):
            image = PIL.Image.fromarray(value)
        elif isinstance(value, bytes | bytearray | memoryview):
            image = PIL.Image.open(io.BytesIO(value))
        else:
            image = value
        # PIL opens a file without reading its pixels: without this, a truncated file would fail while it is cropped.
        image.load()
        if 0 in image.size:
            raise ValueError(f"the image has {image.width} x {image.height} pixels")
        return convert_to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        # Everything is in memory by now, so whatever a decoder raises is a property of these bytes. Decoders raise
        # more than OSError: SyntaxError, struct.error, IndexError, DecompressionBombError.
        raise CorruptImageError(f"{type(error).__name__}: {error}") from error


def _rows(table: Mapping[str, Sequence[Any]], columns: ImageColumns) -> list[Row]:
    """Raw rows of a table of columns."""
    images = table[columns.image]
    nothing = [None] * len(images)
    labels = nothing if columns.label is None else table[columns.label]
    captions = nothing if columns.caption is None else table[columns.caption]
    return [Row(*values) for values in zip(images, labels, captions, strict=True)]


class ImageSource:
    """
    Undecoded rows of a data set, by chunk. Made by [`~maetok_hf.data.open_images`]; the subclasses know the formats.

    Args:
        description (`str`): What the source is, for messages.
        columns ([`ImageColumns`]): The columns that are read.
        chunks (`Sequence[tuple[int, int]]`): Shard and number of rows of every chunk, in the order of the data set.
        sequential (`bool`, *optional*, defaults to `False`): Whether a shard can only be read from its beginning.
        token (`str` or `bool`, *optional*): Token for files on the Hub.

    Attributes:
        num_rows (`int`): Rows of the data set.
        chunk_sizes (`np.ndarray`): Rows of every chunk, of shape `(num_chunks,)`.
        chunk_starts (`np.ndarray`): Index in the data set of the first row of every chunk, of shape `(num_chunks,)`.
        chunk_shards (`np.ndarray`): Shard of every chunk, of shape `(num_chunks,)`.
        files (`Sequence[str]`): Paths or URLs of the files, none if they are not known.
        warn ([`RowWarnings`]): Where all loaders of this source report the rows that they cannot use.

    Raises:
        ValueError: If there are no rows.
    """

    files: Sequence[str] = ()

    def __init__(
        self,
        description: str,
        columns: ImageColumns,
        chunks: Sequence[tuple[int, int]],
        sequential: bool = False,
        token: str | bool | None = None,
    ):
        self.description = description
        self.columns = columns
        self.sequential = sequential
        self.token = token
        table = np.asarray(chunks, dtype=np.int64).reshape(-1, 2)
        self.chunk_shards, self.chunk_sizes = table[:, 0].copy(), table[:, 1].copy()
        ends = np.cumsum(self.chunk_sizes)
        self.chunk_starts = ends - self.chunk_sizes
        self.num_rows = int(ends[-1]) if len(ends) else 0
        if self.num_rows == 0:
            raise ValueError(f"{description} has no rows.")
        self.warn = RowWarnings(logger, description)
        self._open: OrderedDict = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        kind = type(self).__name__
        return f"{kind}({self.description!r}, num_rows={self.num_rows}, num_chunks={len(self.chunk_sizes)})"

    @property
    def num_classes(self) -> int | None:
        """Number of classes, `None` if the data set does not say."""
        return self.columns.num_classes

    @property
    def id2label(self) -> dict[int, str] | None:
        """Class names by index, `None` if the data set does not say."""
        return self.columns.id2label

    def read_chunk(self, chunk: int) -> list[Row]:
        """
        Args:
            chunk (`int`): Number of a chunk.

        Returns:
            `list[Row]`: Its raw rows, `chunk_sizes[chunk]` of them. No image is decoded.
        """
        raise NotImplementedError

    def listing(self) -> Iterator[tuple[Any, ...]]:
        """
        What tells the files of the data set from those of another one without reading them, wherever they lie.

        Returns:
            `Iterator[tuple]`: Plain values for every file, in the order of the data set.
        """
        return ((_file_name(file),) for file in self.files)

    def decode(self, row: Row) -> Sample:
        """
        Args:
            row ([`Row`]): A raw row of [`~ImageSource.read_chunk`].

        Returns:
            [`Sample`]: What it holds.

        Raises:
            CorruptImageError: If there is no image or it cannot be decoded.
        """
        columns = self.columns
        image, names = decode_image(row.image, self.token)
        label, caption = columns.label_index(row.label), columns.caption_text(row.caption)
        if columns.label is not None and label < 0:
            names += ("unlabeled",)
        if columns.caption is not None and caption is None:
            names += ("uncaptioned",)
        return Sample(image, label, caption, names)

    def _handles(self) -> OrderedDict:
        # Open files and iterators are never shared with a worker process that was forked from this one.
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        return self._open

    def _handle(self, key: Any, open_: Any) -> Any:
        handles = self._handles()
        if key not in handles:
            while len(handles) >= MAX_OPEN_FILES:
                handles.popitem(last=False)[1].close()
            handles[key] = open_()
        handles.move_to_end(key)
        return handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _file_name(path: str) -> str:
    """The last part of a path or URL, of a file in an archive that of the file."""
    return os.path.basename(path.split("::")[0])


def _file_size(path: str) -> int:
    """Bytes of a local file, -1 if it is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class DatasetSource(ImageSource):
    """
    A map-style `datasets.Dataset`: one shard with random access. A folder of images is one of paths.

    Args:
        dataset (`datasets.Dataset`): The data set, its image column not decoded.
        description, columns, token: See [`ImageSource`].
        chunk_size (`int`): Rows of a chunk.
    """

    def __init__(self, dataset, description: str, columns: ImageColumns, chunk_size: int, token=None):
        self.dataset = dataset.select_columns(columns.names)
        sizes = [min(chunk_size, len(dataset) - start) for start in range(0, len(dataset), chunk_size)]
        super().__init__(description, columns, [(0, size) for size in sizes], token=token)

    def read_chunk(self, chunk: int) -> list[Row]:
        start = int(self.chunk_starts[chunk])
        return _rows(self.dataset[start : start + int(self.chunk_sizes[chunk])], self.columns)

    def listing(self) -> Iterator[tuple[Any, ...]]:
        if getattr(self.dataset.features[self.columns.image], "dtype", None) != "string":
            return  # of other data sets only the rows say what they are
        for table in self.dataset.iter(batch_size=10_000):
            for path, *others in _rows(table, self.columns):
                yield _file_name(path), _file_size(path), *others


class ParquetSource(ImageSource):
    """
    Parquet files, local or on the Hub: a shard is a file, a chunk one or more whole row groups, which is the unit that
    can be read on its own.

    Args:
        files (`Sequence[str]`): Paths or URLs.
        row_groups (`Sequence[Sequence[int]]`): Rows of every row group of every file, from the footers.
        description, columns, token: See [`ImageSource`].
        chunk_size (`int`): Row groups smaller than this are joined.
    """

    def __init__(self, files, row_groups, description: str, columns: ImageColumns, chunk_size: int, token=None):
        self.files = list(files)
        chunks, self._groups = [], []
        for shard, sizes in enumerate(row_groups):
            first, size = 0, 0
            for group, rows in enumerate(sizes):
                size += rows
                if size >= chunk_size or (size and group == len(sizes) - 1):
                    chunks.append((shard, size))
                    self._groups.append((first, group + 1))
                    first, size = group + 1, 0
        super().__init__(description, columns, chunks, token=token)
        self._footers: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_footers": {}}

    @staticmethod
    def count(file: str, token: str | bool | None = None) -> list[int]:
        """Rows of every row group of a file; reads the footer only."""
        import pyarrow.parquet as pq

        with open_binary(file, token) as handle:
            metadata = pq.read_metadata(handle)
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def _open_file(self, path: str) -> Any:
        import pyarrow.parquet as pq

        # An epoch goes from file to file, more than can be open at a time: the footer of each is read only once.
        file = pq.ParquetFile(open_binary(path, self.token), metadata=self._footers.get(path), pre_buffer=False)
        self._footers[path] = file.metadata
        return file

    def read_table(self, chunk: int, names: list[str]) -> Any:
        """
        Args:
            chunk (`int`): Number of a chunk.
            names (`list[str]`): Columns.

        Returns:
            `pyarrow.Table`: These columns of its rows.
        """
        path = self.files[self.chunk_shards[chunk]]
        file = self._handle(path, lambda: self._open_file(path))
        # Threads of a parent process do not survive a fork, and the data workers are the parallelism already.
        return file.read_row_groups(list(range(*self._groups[chunk])), columns=names, use_threads=False)

    def read_chunk(self, chunk: int) -> list[Row]:
        return _rows(self.read_table(chunk, self.columns.names).to_pydict(), self.columns)


def _tar_samples(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Samples of a tar file in the WebDataset convention (consecutive members whose paths agree up to the first dot of
    the file name), from the file's position on, as the offset of the first member and the members by extension.
    """
    import tarfile

    key, offset, members = None, 0, {}
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # the archive would keep every header it has seen
            folder, _, name = member.name.rpartition("/")
            stem, dot, extension = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            if members and key != (folder, stem):
                yield offset, members
                members = {}
            if not members:
                key, offset = (folder, stem), member.offset
            members[extension] = (archive, member)
        if members:
            yield offset, members


class TarSource(ImageSource):
    """
    Uncompressed WebDataset tar files, local or on the Hub: a shard is a file, a chunk a run of samples whose byte
    offset is known, so that it can be read without what lies before it.

    Args:
        files (`Sequence[str]`): Paths or URLs.
        indices (`Sequence[Mapping]`): `{"num_rows", "offsets"}` of every file, the byte offsets of every
            `chunk_size`-th sample.
        description, columns, token: See [`ImageSource`].
        chunk_size (`int`): Samples of a chunk.
    """

    def __init__(self, files, indices, description: str, columns: ImageColumns, chunk_size: int, token=None):
        self.files = list(files)
        chunks, self._offsets = [], []
        for shard, index in enumerate(indices):
            for number, offset in enumerate(index["offsets"]):
                chunks.append((shard, min(chunk_size, index["num_rows"] - number * chunk_size)))
                self._offsets.append(offset)
        super().__init__(description, columns, chunks, token=token)

    @staticmethod
    def count(file: str, chunk_size: int, token: str | bool | None = None) -> dict[str, Any]:
        """Number of samples and chunk offsets of a file; reads the headers only."""
        import tarfile

        num_rows, offsets = 0, []
        try:
            with open_binary(file, token) as handle:
                for offset, _ in _tar_samples(handle):
                    if num_rows % chunk_size == 0:
                        offsets.append(offset)
                    num_rows += 1
        except tarfile.TarError as error:
            raise ValueError(f"{file!r} is no complete tar file ({error}); fetch it again or leave it out.") from error
        return {"num_rows": num_rows, "offsets": offsets}

    def read_chunk(self, chunk: int) -> list[Row]:
        path = self.files[self.chunk_shards[chunk]]
        file = self._handle(path, lambda: open_binary(path, self.token))
        file.seek(self._offsets[chunk])

        rows = []
        for _, members in _tar_samples(file):
            table = {}
            for name in self.columns.names:
                archive, member = members.get(name, (None, None))
                table[name] = [None if archive is None else archive.extractfile(member).read()]
            rows += _rows(table, self.columns)
            if len(rows) == self.chunk_sizes[chunk]:
                break
        return rows


class StreamSource(ImageSource):
    """
    Any `datasets.IterableDataset`. Its shards can only be read from their beginning, so a shuffled epoch permutes the
    shards and mixes rows within blocks of neighbours; a start inside a shard reads, without decoding, what lies
    before it.

    Args:
        dataset (`datasets.IterableDataset`): The data set, its image column not decoded.
        shard_sizes (`Sequence[int]`): Rows of every shard.
        description, columns, token: See [`ImageSource`].
        chunk_size (`int`): Rows of a chunk.
    """

    def __init__(self, dataset, shard_sizes, description: str, columns: ImageColumns, chunk_size: int, token=None):
        self.dataset = dataset
        self.shard_sizes = list(shard_sizes)
        self.chunk_size = chunk_size
        chunks, self._numbers = [], []
        for shard, size in enumerate(shard_sizes):
            for number, start in enumerate(range(0, size, chunk_size)):
                chunks.append((shard, min(chunk_size, size - start)))
                self._numbers.append(number)
        super().__init__(description, columns, chunks, sequential=True, token=token)

    @staticmethod
    def iterate(dataset, shard: int, columns: ImageColumns, chunk_size: int) -> Iterator[list[Row]]:
        """Rows of one shard, `chunk_size` at a time."""
        # A fresh object, because iterators of one object share their state. `iter` does not deal the shard out to
        # the data workers of torch, as `__iter__` would.
        dataset = dataset.shard(num_shards=dataset.num_shards, index=shard)
        for batch in dataset.iter(batch_size=chunk_size):
            yield _rows(batch, columns)

    def read_chunk(self, chunk: int) -> list[Row]:
        shard, number = int(self.chunk_shards[chunk]), self._numbers[chunk]
        # One iterator per reader of the shard: the streams of a process progress side by side.
        handles = self._handles()
        position = max((at for of, at in handles if of == shard and at <= number), default=None)
        if position is None:
            while len(handles) >= MAX_OPEN_STREAMS:
                handles.popitem(last=False)
            position, iterator = 0, self.iterate(self.dataset, shard, self.columns, self.chunk_size)
        else:
            iterator = handles.pop((shard, position))
        rows = None
        for _ in range(position, number + 1):
            rows = next(iterator, None)
        if rows is None or len(rows) != self.chunk_sizes[chunk]:
            raise ValueError(
                f"Shard {shard} of {self.description} has become shorter since its rows were counted: the data set "
                "must give the same rows in the same order every time it is read."
            )
        handles[(shard, number + 1)] = iterator
        return rows


def _extend_paths(paths: list[Row], rows: list[Row]) -> list[Row] | None:
    for image, *_ in rows:
        if not (isinstance(image, Mapping) and image.get("bytes") is None and image.get("path")):
            return None
    paths.extend(rows)
    return paths


def count_stream(dataset, columns: ImageColumns, chunk_size: int) -> tuple[list[int], list[Row] | None]:
    """
    Count the rows of an `datasets.IterableDataset` in one pass over undecoded rows.

    Args:
        dataset (`datasets.IterableDataset`): The data set, its image column not decoded.
        columns ([`ImageColumns`]): The columns that are read.
        chunk_size (`int`): Rows read at a time.

    Returns:
        `tuple[list[int], list[Row] | None]`: Rows of every shard, and all rows if they hold paths only (so that
        they can be kept), else `None`.
    """
    sizes: list[int] = []
    paths: list[Row] | None = []
    for shard in range(dataset.num_shards):
        sizes.append(0)
        for rows in StreamSource.iterate(dataset, shard, columns, chunk_size):
            sizes[-1] += len(rows)
            if paths is not None:
                paths = _extend_paths(paths, rows)
    return sizes, paths


def map_files(function: Any, files: Sequence[str]) -> Iterator[Any]:
    """Results of a function of a file, in order, several files at a time."""
    with ThreadPoolExecutor(max_workers=min(NUM_THREADS, max(1, len(files)))) as pool:
        yield from pool.map(function, files)
