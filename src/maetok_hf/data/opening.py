"""Open an image data set by name, folder or object as an [`ImageSource`]."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .batches import check_integer
from .columns import find_columns
from .explain import is_disk_full, opening, reading
from .sources import DatasetSource, ImageSource, ParquetSource, StreamSource, TarSource, count_stream, map_files


logger = logging.getLogger(__name__)

_CACHE_VERSION = 1
_SECONDS_BETWEEN_SAVES = 30.0
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def _file_key(file: str, token: str | bool | None) -> str:
    import fsspec

    if file.startswith("hf://") and "@" in file:
        return file  # holds the commit
    options = {"token": token} if file.startswith("hf://") and token is not None else {}
    file_system, path = fsspec.core.url_to_fs(file, **options)
    return f"{file} {file_system.ukey(path)}"


def _lock(stack: contextlib.ExitStack, lock: Path, counts: Path) -> None:
    """Hold the file `lock` until the stack is left. Whoever held it has removed it: another may be there by now."""
    import fcntl

    while True:
        file = stack.enter_context(open(lock, "w"))
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("Another process is counting rows, which are kept in %s: waiting for it.", counts)
            fcntl.lockf(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                return


class _CountCache:
    """
    Row counts of files, each kept in a JSON file under a name that changes with the files.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Where.
        token (`str` or `bool`, *optional*): Token for files on the Hub.
    """

    def __init__(self, folder: str | os.PathLike | None, token: str | bool | None):
        if folder is None:
            from datasets import config

            folder = Path(config.HF_DATASETS_CACHE) / "maetok_hf"
        self.folder = Path(folder)
        self.token = token

    def path(self, kind: str, files: Sequence[str], *identity: Any) -> Path:
        """Where the counts of files are kept; `identity` is what they depend on besides the files."""
        keys = list(map_files(lambda file: _file_key(file, self.token), files))
        text = json.dumps([_CACHE_VERSION, kind, *identity, keys])
        return self.folder / f"{kind}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.json"

    @staticmethod
    def load(path: Path) -> list[Any] | None:
        """The counts, `None` if they are not there or damaged; `None` for a file that is not counted yet."""
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return None

    @staticmethod
    def save(path: Path, counts: list[Any]) -> None:
        """Keep counts; a failure is logged and costs a second count next time."""
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                json.dump(counts, file)
            os.replace(temporary, path)
        except OSError as error:
            advice = "free some space on that disk" if is_disk_full(error) else "check that folder"
            logger.warning(
                "The row counts could not be kept in %s (%s); they are counted again next time: %s, or pass "
                "another `cache_dir`.", path, error, advice,
            )  # fmt: skip
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    @contextlib.contextmanager
    def turn(self, path: Path) -> Iterator[None]:
        """
        While counts are missing, one process at a time: the others wait here, and find its counts. That takes no
        collective of the processes, which would give up after some minutes, and a process that dies lets the next in.
        """
        counts = self.load(path)
        with contextlib.ExitStack() as stack:
            if counts is None or None in counts:
                lock = path.with_suffix(".lock")
                with contextlib.suppress(OSError):  # no lock can be had in that folder: each process counts
                    path.parent.mkdir(parents=True, exist_ok=True)
                    _lock(stack, lock, path)
                    stack.callback(lock.unlink, missing_ok=True)
            yield

    def count_files(self, kind: str, files: Sequence[str], count: Callable[[str], Any], *identity: Any) -> list[Any]:
        """What `count` says of every file; what is counted when it fails or is stopped need not be counted again."""
        path = self.path(kind, files, *identity)
        with self.turn(path):
            counts = self.load(path) or [None] * len(files)
            missing = [number for number, value in enumerate(counts) if value is None]
            if not missing:
                return counts
            logger.info("Counting the rows of %d %s files, once.", len(missing), kind)
            saved = time.monotonic()
            try:
                for done, value in enumerate(map_files(count, [files[number] for number in missing]), start=1):
                    counts[missing[done - 1]] = value
                    if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                        logger.info("%d of %d files are counted.", done, len(missing))
                        self.save(path, counts)
                        saved = time.monotonic()
            finally:
                self.save(path, counts)
        return counts


def _choose_split(splits: Sequence[str], split: str | None, data: str) -> str:
    if split is None:
        if "train" in splits:
            return "train"
        if len(splits) == 1:
            return splits[0]
        raise ValueError(f"{data!r} has no split 'train': name one of {', '.join(map(repr, splits))} with `split`.")
    if split not in splits:
        hint = " A stream cannot be cut by `[...]`: keep held-out images in a split or folder of their own."
        raise ValueError(
            f"`split={split!r}` is not a split of {data!r}; it has {', '.join(map(repr, splits))}."
            + (hint if "[" in split or "+" in split else "")
        )
    return split


def _without_decoding(dataset: Any, features: Mapping[str, Any] | None, image_column: str) -> Any:
    from datasets import Image

    if features is not None and isinstance(features.get(image_column), Image):
        return dataset.cast_column(image_column, Image(decode=False))
    return dataset


def _open_map_style(dataset: Any, description: str, chunk_size: int, token: Any, columns: dict) -> ImageSource:
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"{description} has a transform (`set_transform`), which would not be applied: remove it with "
            "`dataset.with_format(None)`; images are cropped and converted by `StreamingImages`."
        )
    if len(dataset) == 0:
        raise ValueError(f"{description} has no rows.")
    found = find_columns(dataset.features, **columns)
    dataset = _without_decoding(dataset.with_format(None), dataset.features, found.image)
    return DatasetSource(dataset, description, found, chunk_size, token)


def _open_stream(
    dataset: Any,
    description: str,
    chunk_size: int,
    token: Any,
    columns: dict,
    shard_sizes: list[int] | None = None,
    keep: Callable[[list[int]], None] | None = None,
) -> ImageSource:
    """Opens a stream; unless `shard_sizes` are known, its rows are counted in one pass and given to `keep`."""
    from datasets import Dataset

    dataset = dataset.with_format(None)
    features = dataset.features
    if features is None:
        first = next(iter(dataset), None)
        if first is None:
            raise ValueError(f"{description} has no rows.")
        found = find_columns(Dataset.from_list([first]).features, **columns)
    else:
        found = find_columns(features, **columns)
    dataset = _without_decoding(dataset, features, found.image).select_columns(found.names)
    if shard_sizes is None:
        logger.info("Counting the rows of %s in one pass.", description)
        shard_sizes, paths = count_stream(dataset, found, chunk_size)
        if paths:
            # A folder of images: its rows are short, so all of them are kept and any of them can be read at once.
            table = {found.image: [row.image["path"] for row in paths]}
            if found.label is not None:
                table[found.label] = [row.label for row in paths]
            if found.caption is not None:
                table[found.caption] = [row.caption for row in paths]
            return DatasetSource(Dataset.from_dict(table), description, found, chunk_size, token)
        if keep is not None:
            keep(shard_sizes)
    return StreamSource(dataset, shard_sizes, description, found, chunk_size, token)


def _open_by_name(
    data: str,
    split: str | None,
    settings: dict[str, Any],
    chunk_size: int,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    columns: dict[str, Any],
) -> ImageSource:
    from datasets import load_dataset_builder
    from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    builder = load_dataset_builder(data, token=token, **settings)
    files_by_split = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
    splits = list(files_by_split) or [str(key) for key in builder.info.splits or {}]
    if splits:
        split = _choose_split(splits, split, data)
    elif split is None:
        split = "train"
    description = f"the split {split!r} of {data!r}"
    stream = builder.as_streaming_dataset(split=split)
    files = files_by_split.get(split, [])
    cache = _CountCache(cache_dir, token)
    if isinstance(builder, Parquet):
        found = find_columns(stream.features, **columns)
        groups = cache.count_files("parquet", files, lambda file: ParquetSource.count(file, token))
        return ParquetSource(files, groups, description, found, chunk_size, token)
    if isinstance(builder, WebDataset) and all(file.endswith(".tar") for file in files):
        found = find_columns(stream.features, **columns)
        indices = cache.count_files("tar", files, lambda file: TarSource.count(file, chunk_size, token), chunk_size)
        return TarSource(files, indices, description, found, chunk_size, token)
    if isinstance(builder, FolderBasedBuilder) or not files:
        return _open_stream(stream, description, chunk_size, token, columns)
    path = cache.path("stream", files, builder.config_id, split, stream.num_shards)
    with cache.turn(path):
        source = _open_stream(
            stream, description, chunk_size, token, columns, cache.load(path), lambda sizes: cache.save(path, sizes)
        )
    source.files = files
    return source


def resolve_folder(data: str | os.PathLike) -> str:
    """
    A folder with the home folder written out, any other name as it is.

    Raises:
        FileNotFoundError: If there is no such folder and it can be nothing else.
    """
    path = os.path.expanduser(os.fspath(data))
    on_the_hub = _HUB_NAME.fullmatch(path) or path.startswith(("hf://", "buckets/"))
    if not os.path.isdir(path) and (isinstance(data, os.PathLike) or not on_the_hub):
        raise FileNotFoundError(
            f"There is no folder {os.path.abspath(path)}: check the path. A data set on the Hub is named like "
            "'ILSVRC/imagenet-1k'; `open_images` also takes single files, as its `data_files`."
        )
    return path


def open_images(
    data: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    use_labels: bool = True,
    caption_column: str | None = None,
    chunk_size: int = 16,
    cache_dir: str | os.PathLike | None = None,
    shard_sizes: Sequence[int] | None = None,
) -> ImageSource:
    """
    Open an image data set for [`StreamingImages`] and [`HeldOutImages`]. Nothing is downloaded as a whole.

    Parquet files, uncompressed WebDataset tar files, folders of images and map-style data sets are read at any place
    directly. Any other stream is read shard by shard from the beginning. The rows of files are counted once and the
    counts kept in `cache_dir`. A folder of images is listed at every opening (about half a millisecond a file: keep
    millions of them in parquet or tar files), and an `IterableDataset` without `shard_sizes` is counted, in one pass.

    Let every process of a run call this at the same time: one of those that share `cache_dir` counts, and the others
    wait for it however long that takes, not in a collective (`accelerator.main_process_first()`), which would give up
    after some minutes. On several machines, put `cache_dir` on a disk they share.

    Args:
        data (`str`, `os.PathLike`, `datasets.Dataset` or `datasets.IterableDataset`): Name of a data set on the Hub, a
            local folder, or the name of a builder such as `"webdataset"` together with `data_dir` or `data_files`, as
            `datasets.load_dataset` takes them; or a loaded data set.
        split (`str`, *optional*): Name of the split. By default `"train"`, or the only split there is.
        name (`str`, *optional*): Configuration of the data set.
        data_dir (`str`, *optional*): Folder inside the data set, or of the builder.
        data_files (`str`, `list` or `dict`, *optional*): Files by split.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Token for private and gated data sets; by default the one of
            `hf auth login`.
        image_column (`str`, *optional*): Image column; found if not given.
        label_column (`str`, *optional*): Class column; found if not given.
        use_labels (`bool`, *optional*, defaults to `True`): `False` reads no classes.
        caption_column (`str`, *optional*): Caption column, or `column.field` for a field of a column of structs or
            JSON objects (such as `json.caption` of a WebDataset). Captions are read only if it is given.
        chunk_size (`int`, *optional*, defaults to 16): Consecutive rows that are read in one go and stay in the same
            shuffled block (row groups of a parquet file are never cut).
        cache_dir (`str` or `os.PathLike`, *optional*): Where row counts are kept; by default `maetok_hf` in the cache
            folder of `datasets`.
        shard_sizes (`Sequence[int]`, *optional*): Rows of every shard of an `IterableDataset`, which is not counted
            then: the `shard_sizes` of the source that one process has opened spare all others the pass.

    Returns:
        [`ImageSource`]: The rows; it knows `num_rows`, `num_classes` and `id2label`.

    Raises:
        ValueError: If a split or column is missing or ambiguous (the message lists what there is), if there are no
            rows, or if an argument does not fit the kind of `data`.
        OSError: If the data set does not exist, is gated or cannot be reached, or the disk is full; the message says
            what to do.
    """
    from datasets import Dataset, IterableDataset

    check_integer("chunk_size", chunk_size, 1)
    columns = {
        "image_column": image_column,
        "label_column": label_column,
        "use_labels": use_labels,
        "caption_column": caption_column,
    }
    if shard_sizes is not None and not isinstance(data, IterableDataset):
        raise ValueError(
            f"`shard_sizes` are for a loaded `datasets.IterableDataset`, and `data` is {type(data)}: leave them out."
        )
    settings = {"name": name, "data_dir": data_dir, "data_files": data_files, "revision": revision}
    if isinstance(data, Dataset | IterableDataset):
        given = [argument for argument, value in {"split": split, **settings}.items() if value is not None]
        if given:
            raise ValueError(
                f"`{'`, `'.join(given)}` names a part of a data set that is still to be loaded, but `data` is already "
                f"loaded ({type(data).__name__}): leave it out, or pass the name of the data set."
            )
        description = f"the given {type(data).__name__}"
        if isinstance(data, Dataset):
            return _open_map_style(data, description, chunk_size, token, columns)
        if shard_sizes is not None and len(shard_sizes) != data.num_shards:
            raise ValueError(
                f"`shard_sizes` must be the rows of each of the {data.num_shards} shards, got {len(shard_sizes)}."
            )
        with reading(description):
            return _open_stream(data, description, chunk_size, token, columns, shard_sizes)
    if isinstance(data, Mapping):
        raise ValueError(f"`data` is a dictionary of splits ({', '.join(map(repr, data))}): pass one of them.")
    if not isinstance(data, str | os.PathLike):
        raise ValueError(
            "`data` must be the name of a data set, a folder, a `datasets.Dataset` or a `datasets.IterableDataset`, "
            f"got {type(data)}."
        )
    data = resolve_folder(data)
    with opening(data):
        return _open_by_name(data, split, settings, chunk_size, token, cache_dir, columns)
