"""Open an image data set by name, folder or object as an [`ImageSource`]."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .columns import find_columns
from .sources import DatasetSource, ImageSource, ParquetSource, StreamSource, TarSource, count_stream, map_files


logger = logging.getLogger(__name__)

_CACHE_VERSION = 1


@contextlib.contextmanager
def _explained(data: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"The data set {data!r} could not be opened ({type(error).__name__}: {error}). If it is a folder, check "
            "the path and that it holds images, parquet or tar files. If it is on the Hub, check the spelling and the "
            f"connection; if it is private or gated, accept its terms at https://huggingface.co/datasets/{data} and "
            "log in with `hf auth login`, or pass `token`."
        ) from error


def _file_key(file: str, token: str | bool | None) -> str:
    import fsspec

    if file.startswith("hf://") and "@" in file:
        return file  # holds the commit
    options = {"token": token} if file.startswith("hf://") and token is not None else {}
    file_system, path = fsspec.core.url_to_fs(file, **options)
    return f"{file} {file_system.ukey(path)}"


def _cached_counts(
    kind: str,
    files: Sequence[str],
    chunk_size: int | None,
    token: str | bool | None,
    cache_dir: str | os.PathLike | None,
    count: Callable[[str], Any],
) -> list[Any]:
    """What `count` says of every file, kept in a JSON file under a name that changes with any file."""
    if cache_dir is None:
        from datasets import config

        cache_dir = Path(config.HF_DATASETS_CACHE) / "maetok_hf"
    keys = map_files(lambda file: _file_key(file, token), files)
    identity = json.dumps([_CACHE_VERSION, kind, chunk_size, keys])
    path = Path(cache_dir) / f"{kind}-{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass  # not there yet, or damaged: count again
    logger.info("Counting the rows of %d %s files, once.", len(files), kind)
    counts = map_files(count, files)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(counts, file)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("The row counts could not be kept in %s (%s); they are counted again next time.", path, error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
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


def _open_map_style(dataset: Any, description: str, chunk_size: int, token: Any, **columns: Any) -> ImageSource:
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


def _open_stream(dataset: Any, description: str, chunk_size: int, token: Any, **columns: Any) -> ImageSource:
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
    logger.info("Counting the rows of %s in one pass.", description)
    sizes, paths = count_stream(dataset, found, chunk_size)
    if paths:
        # A folder of images: its rows are short, so all of them are kept and any of them can be read at once.
        images = {found.image: [image["path"] for image, _ in paths]}
        labels = {found.label: [label for _, label in paths]} if found.label is not None else {}
        return DatasetSource(Dataset.from_dict(images | labels), description, found, chunk_size, token)
    return StreamSource(dataset, sizes, description, found, chunk_size, token)


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
    chunk_size: int = 16,
    cache_dir: str | os.PathLike | None = None,
) -> ImageSource:
    """
    Open an image data set for [`StreamingImages`] and [`HeldOutImages`]. Nothing is downloaded as a whole.

    Parquet files, uncompressed WebDataset tar files, folders of images and map-style data sets are read at any place
    directly; the rows of files are counted once and the counts kept in `cache_dir`. Any other stream is read shard by
    shard from the beginning and counted at every opening.

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
        chunk_size (`int`, *optional*, defaults to 16): Consecutive rows that are read in one go and stay in the same
            shuffled block (row groups of a parquet file are never cut).
        cache_dir (`str` or `os.PathLike`, *optional*): Where row counts are kept; by default `maetok_hf` in the cache
            folder of `datasets`.

    Returns:
        [`ImageSource`]: The rows; it knows `num_rows`, `num_classes` and `id2label`.

    Raises:
        ValueError: If a split or column is missing or ambiguous (the message lists what there is), if there are no
            rows, or if an argument does not fit the kind of `data`.
        OSError: If the data set does not exist, is gated, or cannot be reached; the message says what to do.
    """
    from datasets import Dataset, IterableDataset, load_dataset_builder

    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"`chunk_size` must be a positive integer, got {chunk_size!r}.")
    columns = {"image_column": image_column, "label_column": label_column, "use_labels": use_labels}
    if isinstance(data, Dataset | IterableDataset):
        by_name = {
            "split": split, "name": name, "data_dir": data_dir, "data_files": data_files, "revision": revision
        }  # fmt: skip
        given = [argument for argument, value in by_name.items() if value is not None]
        if given:
            raise ValueError(
                f"`{'`, `'.join(given)}` names a part of a data set that is still to be loaded, but `data` is already "
                f"loaded ({type(data).__name__}): leave it out, or pass the name of the data set."
            )
        open_ = _open_map_style if isinstance(data, Dataset) else _open_stream
        return open_(data, f"the given {type(data).__name__}", chunk_size, token, **columns)
    if isinstance(data, Mapping):
        raise ValueError(f"`data` is a dictionary of splits ({', '.join(map(repr, data))}): pass one of them.")
    if not isinstance(data, str | os.PathLike):
        raise ValueError(
            "`data` must be the name of a data set, a folder, a `datasets.Dataset` or a `datasets.IterableDataset`, "
            f"got {type(data)}."
        )

    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    data = os.fspath(data)
    with _explained(data):
        builder = load_dataset_builder(
            data, name=name, data_dir=data_dir, data_files=data_files, revision=revision, token=token
        )
        files_by_split = {str(key): list(files) for key, files in (builder.config.data_files or {}).items()}
        splits = list(files_by_split) or [str(key) for key in builder.info.splits or {}]
        if splits:
            split = _choose_split(splits, split, data)
        elif split is None:
            split = "train"
        description = f"the split {split!r} of {data!r}"
        stream = builder.as_streaming_dataset(split=split)
        files = files_by_split.get(split, [])
        if isinstance(builder, Parquet):
            found = find_columns(stream.features, **columns)
            groups = _cached_counts(
                "parquet", files, None, token, cache_dir, lambda file: ParquetSource.count(file, token)
            )
            return ParquetSource(files, groups, description, found, chunk_size, token)
        if isinstance(builder, WebDataset) and all(file.endswith(".tar") for file in files):
            found = find_columns(stream.features, **columns)
            indices = _cached_counts(
                "tar", files, chunk_size, token, cache_dir, lambda file: TarSource.count(file, chunk_size, token)
            )
            return TarSource(files, indices, description, found, chunk_size, token)
        return _open_stream(stream, description, chunk_size, token, **columns)
