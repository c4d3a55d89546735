"""What is analysed: the latents of chosen images, by a tokenizer that encodes them or from a cache."""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import ImageRanges, open_latents, to_pixel_values
from ..data.latent_shards import METADATA_FILE, SETTINGS_FILE
from ..training.checkpointing import data_identity
from ..training.latent_encoding import ViewEncoder, encode_tokens, encoder_digest, load_tokenizer
from .chosen_images import SIDES, ImageData, check_classes, check_counts, check_known_labels, draw_rows
from .latents import collect_latents
from .options import AnalysisOptions
from .stored_latents import LatentChunk


# What is encoded before it is written, and lost by a kill: of this many rows, if they have no more numbers (64 MiB).
BLOCK_ROWS = 1024
BLOCK_NUMEL = 2**24


class Address(NamedTuple):
    """
    Where a tokenizer or a cache of latents is.

    Args:
        name_or_path (`str`): Folder or Hub repository.
        subfolder (`str`, *optional*): Folder of the tokenizer in there.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        is_cache (`bool`, *optional*, defaults to `False`): Whether it is a cache of latents.
    """

    name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    is_cache: bool = False

    @classmethod
    def of(cls, word: str) -> "Address":
        """
        Read an address.

        Args:
            word (`str`): A folder, or `user/name`, `user/name@revision`, `user/name/subfolder` or
                `datasets/user/name`.

        Returns:
            [`Address`]: Where it is.

        Raises:
            ValueError: If it is none of these, or a folder of something else.
        """
        folder = Path(word).expanduser()
        if folder.is_dir():
            if (folder / METADATA_FILE).is_file() or (folder / SETTINGS_FILE).is_file():
                return cls(str(folder), is_cache=True)
            if (folder / "model_index.json").is_file():
                return cls(str(folder), subfolder="vae")
            if (folder / "config.json").is_file():
                return cls(str(folder))
            raise ValueError(
                f"`tokenizer` {word!r} is a folder without config.json (a tokenizer), model_index.json (a pipeline) "
                f"or {METADATA_FILE} (cached latents): check the path."
            )
        found = re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/([\w./-]+))?", word)
        if found is None or word[0] in "./~" or (found[1] and found[4]):
            raise ValueError(
                f"`tokenizer` {word!r} is neither a folder nor a name on the Hub such as user/name, user/name/vae, "
                "user/name@revision or datasets/user/name: check the path."
            )
        return cls(found[2], subfolder=found[4], revision=found[3], is_cache=found[1] is not None)

    @property
    def name(self) -> str:
        """`str`: A name for tables: the repository, or the last folder that says more than `vae`."""
        if not os.path.isdir(self.name_or_path):
            return "/".join(filter(None, [self.name_or_path, self.subfolder]))
        folder = Path(self.name_or_path).resolve()
        return folder.parent.name if folder.name == "vae" else folder.name


class EncodedImages:
    """
    Latents that a tokenizer makes of images, in full float32.

    Args:
        address ([`Address`]): The tokenizer.
        data ([`ImageData`]): The images.
        options ([`AnalysisOptions`]): Resolution, batches and type.
        device (`torch.device`): Where to encode.

    Raises:
        ValueError: If there is no tokenizer of that name, or it gives no latents for images of that size.
        OSError: If it cannot be loaded.
    """

    def __init__(self, address: Address, data: ImageData, options: AnalysisOptions, device: torch.device):
        self.address, self.data, self.options, self.device = address, data, options, device
        tokenizer = self._load()
        empty = torch.zeros(1, 3, options.resolution, options.resolution, device=device)
        self.shape: tuple[int, int] = tuple(encode_tokens(tokenizer, empty).shape[1:])
        self.digest, self.class_name = encoder_digest(tokenizer), type(tokenizer).__name__
        self.rows, self.class_names, self.has_labels = data.rows, data.class_names, data.has_labels
        self.split: str | None = options.split
        self.dtype: torch.dtype = getattr(torch, options.latents_dtype)
        self.resolution = options.resolution

    def _load(self) -> torch.nn.Module:
        address = self.address
        tokenizer = load_tokenizer(address.name_or_path, address.subfolder, address.revision)
        return tokenizer.to(self.device)

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: What the latents depend on besides the choice of rows."""
        options = self.options
        return {
            "encoder": self.digest,
            "images": self.data.identity,
            "resolution": options.resolution,
            "batch_size": options.batch_size,
            "dtype": options.latents_dtype,
        }

    def blocks(self, side: str, first: int) -> Iterator[LatentChunk]:
        """
        Encode.

        Args:
            side (`str`): One of `SIDES`.
            first (`int`): Number of the block to begin with.

        Yields:
            [`LatentChunk`]: Block after block.
        """
        size = self.options.batch_size
        rows, block_rows = self.rows[side], max(1, _block_rows(self.shape) // size) * size
        ranges, blocks = [], []
        for start in range(first * block_rows, len(rows), block_rows):
            found = list(_consecutive(rows[start : start + block_rows]))
            ranges += found
            blocks += [start // block_rows] * len(found)
        images = ImageRanges(
            self.data.sources[side], resolution=self.options.resolution, batch_size=size, ranges=ranges
        )
        encoder = ViewEncoder(self._load(), 1, self.options.latents_dtype)
        loader = images.dataloader(self.options.dataloader_num_workers)
        for number, parts in itertools.groupby(loader, key=lambda batch: blocks[batch["range"]]):
            yield self._encode(number, parts, encoder)

    def _encode(self, number: int, parts: Iterable[Mapping[str, Any]], encoder: ViewEncoder) -> LatentChunk:
        unlabeled, indices = [0], []

        def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for images, labels, rows in _batches(self._labeled(parts, unlabeled), self.options.batch_size):
                indices.append(rows)
                yield images, labels

        def encode(images: torch.Tensor) -> torch.Tensor:
            return encoder(to_pixel_values(images, self.device))[0][0]

        found = pairs()
        batch = next(found, None)
        if batch is None:
            nothing = torch.empty(0, dtype=torch.int64)
            return LatentChunk(number, torch.empty(0, *self.shape, dtype=self.dtype), nothing, nothing, unlabeled[0])
        latents, labels = collect_latents(itertools.chain([batch], found), encode)
        return LatentChunk(number, latents.to(self.dtype), labels, torch.cat(indices), unlabeled[0])

    def _labeled(self, parts: Iterable[Mapping[str, Any]], unlabeled: list[int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Images, classes and rows of each part, of a data set with classes those that have one."""
        for part in parts:
            labels = part.get("class_labels", torch.full_like(part["indices"], -1))
            kept = (labels >= 0) | (not self.has_labels)
            unlabeled[0] += int((~kept).sum())
            yield part["images"][kept], labels[kept], part["indices"][kept]


class CachedLatents:
    """
    Latents that `cache_latents.py` has stored: of the images as they are, not of their mirror images.

    Args:
        address ([`Address`]): The cache.
        data ([`ImageData`], *optional*): The images that tokenizers encode beside it.
        options ([`AnalysisOptions`]): Which images.

    Raises:
        ValueError: If the cache is unfinished or of other images, or a split of its own is held out.
        OSError: If it does not exist or cannot be reached.
    """

    def __init__(self, address: Address, data: ImageData | None, options: AnalysisOptions):
        self.address = address
        self.source = open_latents(address.name_or_path, revision=address.revision)
        metadata = self.source.metadata
        if options.held_out_split is not None:
            raise ValueError(
                f"{self.source.description} are of one split, so `held_out_split` {options.held_out_split!r} is not "
                "among them: leave it out, and a share is held out; or name the tokenizer itself."
            )
        self.num_images = metadata["num_images"]
        self.shape: tuple[int, int] = self.source.latent_shape
        self.digest = metadata["tokenizer"]["digest"]
        self.class_name = metadata["tokenizer"].get("class", "unknown")
        self.class_names = self.source.columns.class_names
        self.has_labels = metadata["num_unlabeled"] < metadata["num_rows"]
        self.dtype: torch.dtype = getattr(torch, metadata["dtype"])
        self.resolution, self.split = metadata.get("resolution"), metadata.get("split")
        if data is not None:
            self._check_same_images(data, options.split)
        self.rows = draw_rows(options, self.num_images) if data is None else data.rows

    def _check_same_images(self, data: ImageData, split: str) -> None:
        source = data.sources["train"]
        here = {"split": split, "num_images": source.num_rows, "class_names": data.class_names}
        there = {
            "split": self.source.metadata["split"],
            "num_images": self.num_images,
            "class_names": self.class_names,
        }
        known = self.image_digest
        if known is not None:
            here["digest"], there["digest"] = data_identity(source)["digest"], known
        if here != there:
            different = ", ".join(
                f"{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]
            )
            raise ValueError(
                f"{self.source.description} are not of the images of `dataset` ({different}): give the data set, "
                "split and label column that they were made of."
            )

    @property
    def image_digest(self) -> str | None:
        """`str`, *optional*: Digest of the data set of images, if the cache says it."""
        path = Path(self.address.name_or_path) / SETTINGS_FILE
        if not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))["data"]["digest"]

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: What the latents depend on besides the choice of rows."""
        return self.source.identity

    def blocks(self, side: str, first: int) -> Iterator[LatentChunk]:
        """
        Read.

        Args:
            side (`str`): One of `SIDES`.
            first (`int`): Number of the block to begin with.

        Yields:
            [`LatentChunk`]: Block after block.
        """
        wanted = np.zeros(self.num_images, dtype=bool)
        wanted[self.rows[side]] = True
        numbers = self.source.chunk_starts // _block_rows(self.shape)
        chunks = np.flatnonzero(numbers >= first).tolist()
        for number, group in itertools.groupby(chunks, key=lambda chunk: int(numbers[chunk])):
            latents, labels, indices, unlabeled = [], [], [], 0
            for chunk in group:
                rows = self.source.read_chunk(chunk, 1)
                chosen = wanted[rows.indices]
                kept = chosen & (rows.labels >= 0) if self.has_labels else chosen
                unlabeled += int(chosen.sum() - kept.sum())
                latents.append(rows.latents[0][kept])
                labels.append(rows.labels[kept])
                indices.append(rows.indices[kept])
            values = torch.from_numpy(np.concatenate(latents)).view(-1, *self.shape)
            rest = (torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in (labels, indices))
            yield LatentChunk(number, values, *rest, unlabeled)


Subject = EncodedImages | CachedLatents


def open_subjects(options: AnalysisOptions, device: torch.device) -> dict[str, Subject]:
    """
    Everything that is compared, by name. Nothing is encoded yet, and what cannot be analysed is refused here.

    Args:
        options ([`AnalysisOptions`]): What is asked for.
        device (`torch.device`): Where to encode.

    Returns:
        `dict[str, EncodedImages | CachedLatents]`: In the order of `options.tokenizer`.

    Raises:
        ValueError: If tokenizer, cache or data set are missing or do not fit each other or the options.
        OSError: If one cannot be reached.
    """
    addresses = [Address.of(word) for word in options.tokenizer]
    names = options.names or [address.name for address in addresses]
    if len(set(names)) < len(names):
        raise ValueError(f"The tokenizers would be called {names}: tell them apart by `names`.")
    if options.dataset is None and not all(address.is_cache for address in addresses):
        raise ValueError("`dataset` is missing: name the images that the tokenizers shall encode.")
    data = None if options.dataset is None else ImageData(options)
    if data is not None:
        check_classes(options, "`dataset`", data.has_labels, data.class_names)
        check_known_labels(options, {side: data.known_labels(side) for side in SIDES}, data.rows)
    subjects: dict[str, Subject] = {}
    for name, address in zip(names, addresses, strict=True):
        if address.is_cache:
            subjects[name] = CachedLatents(address, data, options)
        else:
            subjects[name] = EncodedImages(address, data, options, device)
        check_classes(options, repr(name), subjects[name].has_labels, subjects[name].class_names)
        check_counts(options, {side: len(rows) for side, rows in subjects[name].rows.items()})
    if data is None:
        _check_caches(subjects)
    return subjects


def _check_caches(subjects: Mapping[str, CachedLatents]) -> None:
    """Caches that are compared must be of the same images."""
    (first, one), *others = subjects.items()
    for name, other in others:
        digests = {one.image_digest, other.image_digest} - {None}
        if (one.num_images, one.class_names) != (other.num_images, other.class_names) or len(digests) > 1:
            raise ValueError(f"{first!r} and {name!r} are latents of different images: cache those of the same ones.")


def _block_rows(shape: tuple[int, int]) -> int:
    return max(1, min(BLOCK_ROWS, BLOCK_NUMEL // (shape[0] * shape[1])))


def _consecutive(rows: np.ndarray) -> Iterator[range]:
    """Ascending rows as ranges."""
    for part in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        yield range(int(part[0]), int(part[-1]) + 1)


def _batches(parts: Iterable[tuple[torch.Tensor, ...]], size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows in batches of `size`, the last one of what is left."""
    waiting: list[tuple[torch.Tensor, ...]] = []
    for part in parts:
        waiting.append(part)
        if sum(len(labels) for _, labels, _ in waiting) >= size:
            joined = [torch.cat(tensors) for tensors in zip(*waiting, strict=True)]
            while len(joined[1]) >= size:
                yield tuple(tensor[:size] for tensor in joined)
                joined = [tensor[size:] for tensor in joined]
            waiting = [tuple(tensor.clone() for tensor in joined)]
    joined = [torch.cat(tensors) for tensors in zip(*waiting, strict=True)] if waiting else []
    if joined and len(joined[1]):
        yield tuple(joined)
