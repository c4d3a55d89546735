"""
What generated images are compared with: statistics in a file, features that an evaluation has kept, or images.

A reference file of ADM's suite, such as `VIRTUAL_imagenet256_labeled.npz`, is two things: statistics of the whole
training set, for FID and sFID, and 10 000 of its images, for precision and recall.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import open_images
from .collection import FeatureCollector
from .extractors import FeatureExtractor, extractor_identity, load_statistics
from .image_sets import NPZ_ENTRY, DatasetImages, ImageReader, NpzImages, image_set_identity, open_image_set
from .options import ScoreOptions
from .statistics import Moments


DEFAULT_SPLIT = "train"


class Reference:
    """
    Statistics and features of a reference, of which some are in a file and the others are to be computed of images.

    Args:
        description (`str`): What it is, for the protocol.
        known (`Mapping[str, Moments]`, *optional*): Statistics by layer, from a file.
        collected ([`FeatureCollector`], *optional*): Features and statistics of an earlier evaluation.
        images ([`ImageReader`], *optional*): Of which the rest is computed.
    """

    def __init__(
        self,
        description: str,
        known: Mapping[str, Moments] | None = None,
        collected: FeatureCollector | None = None,
        images: ImageReader | None = None,
    ):
        self.description, self.images = description, images
        self._known, self._collected = dict(known or {}), collected

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: What makes it the same one, wherever it lies, in plain values."""
        moments = dict(self._known)
        if self._collected is not None:
            moments |= {layer: self._collected.moments(layer) for layer in self._collected.layers[0]}
        digest = hashlib.blake2b(digest_size=16)
        for layer, found in sorted(moments.items()):
            digest.update(repr((layer, found.num_samples)).encode())
            digest.update(found.mean.numpy().tobytes() + found.covariance.numpy().tobytes())
        return {
            "statistics": digest.hexdigest() if moments else None,
            "images": None if self.images is None else image_set_identity(self.images),
        }

    @property
    def num_images(self) -> int | None:
        """`int`, *optional*: Images that there are or were; `None` for a file of statistics, which may not say it."""
        if self.images is not None:
            return len(self.images)
        return None if self._collected is None else self._collected.num_images

    def missing(self, statistics: Sequence[str], features: Sequence[str]) -> tuple[list[str], list[str]]:
        """
        What must be computed of the images.

        Args:
            statistics (`Sequence[str]`): Layers whose statistics are needed.
            features (`Sequence[str]`): Layers whose features are needed.

        Returns:
            `tuple[list[str], list[str]]`: Those that are not there yet.

        Raises:
            ValueError: If there are no images to compute them of.
        """
        there = ([], []) if self._collected is None else self._collected.layers
        wanted = [name for name in statistics if name not in self._known and name not in there[0]]
        kept = [name for name in features if name not in there[1]]
        if (wanted or kept) and self.images is None:
            parts = [f"statistics of {name!r}" for name in wanted] + [f"features of {name!r}" for name in kept]
            raise ValueError(
                f"`reference` {self.description} lacks {' and '.join(parts)}: leave out the `metrics` that need them, "
                "or give images."
            )
        return wanted, kept

    def add(self, collected: FeatureCollector) -> None:
        """
        Take what was computed of the images.

        Args:
            collected ([`FeatureCollector`]): Complete.
        """
        self._collected = collected

    def moments(self, layer: str) -> Moments:
        """Mean and covariance of a layer."""
        return self._known[layer] if layer in self._known else self._collected.moments(layer)

    def features(self, layer: str) -> torch.Tensor:
        """Features of a layer, of shape `(n, dim)`."""
        return self._collected.features(layer)

    def counts(self, statistics: Sequence[str], features: Sequence[str]) -> tuple[int | None, int | None]:
        """
        How many images it is of, which may differ between statistics and features.

        Args:
            statistics (`Sequence[str]`): Layers whose statistics are used.
            features (`Sequence[str]`): Layers whose features are used.

        Returns:
            `tuple[int | None, int | None]`: Images of the statistics and of the features; `None` if none are used, or
            the file does not say.
        """
        counts = {self.moments(layer).num_samples for layer in statistics}
        of_statistics = counts.pop() if len(counts) == 1 else None
        return of_statistics, len(self.features(features[0])) if features else None


def open_reference(options: ScoreOptions, extractor: FeatureExtractor) -> Reference:
    """
    Find a reference. Nothing is computed yet.

    Args:
        options ([`ScoreOptions`]): What is asked for.
        extractor ([`FeatureExtractor`]): What gives features: those in files must be of the same.

    Returns:
        [`Reference`]: With what its file holds.

    Raises:
        ValueError: If it is nothing that can be compared with, or of another extractor.
    """
    path, count = Path(options.reference), options.reference_num_images
    if options.reference_resolution is not None:
        source = open_images(
            options.reference,
            split=options.reference_split or DEFAULT_SPLIT,
            name=options.reference_config_name,
            use_labels=False,
            cache_dir=options.cache_dir,
        )
        images = DatasetImages(source, options.reference_resolution, count, options.reference_num_workers)
        return Reference(images.description, images=images)
    names = _entries(path) if path.suffix == ".npz" and path.is_file() else []
    if "seen.npy" in names:
        _refuse_count(count, "the features are those of all its images")
        collected = _load_collected(path, extractor_identity(extractor))
        return Reference(f"features in {path.name}", collected=collected)
    known = load_statistics(path, extractor) if {"mu.npy", "sigma.npy"} <= set(names) else {}
    if known and NPZ_ENTRY not in names:
        _refuse_count(count, "a file of statistics holds no images")
        return Reference(f"statistics in {path.name}", known=known)
    if known:
        return Reference(f"statistics and images in {path.name}", known=known, images=NpzImages(path, count))
    images = open_image_set(path, count)
    return Reference(images.description, images=images)


def _entries(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no whole .npz file ({error}): make or download it again.") from error


def _load_collected(path: Path, identity: Mapping[str, str]) -> FeatureCollector:
    with np.load(path, allow_pickle=False) as file:
        recorded = json.loads(str(file["protocol"]))
    for name, value in identity.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{path} holds features of another {name.replace('_', ' ')}, {recorded.get(name)!r}, than {value!r}: "
                "give that extractor, or images."
            )
    collected = FeatureCollector.load(path, recorded)
    if not collected.seen.all():
        raise ValueError(f"{path} is a part of an evaluation that is not finished: finish it first.")
    return collected


def _refuse_count(count: int | None, why: str) -> None:
    if count is not None:
        raise ValueError(f"`reference_num_images` = {count} has no effect with this `reference`, as {why}: remove it.")
