"""Features of exactly N images, each counted once, whichever process read it and however often the run was killed."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..moments import RunningMoments
from .extractors import FeatureExtractor
from .image_sets import ImageReader
from .statistics import Moments, feature_moments, write_arrays


class FeatureCollector:
    """
    Statistics of some layers of an extractor, the features of some, and which images they are of.

    For 50 000 images of Inception this is 34 MB each for the statistics of pooled and spatial features, 410 MB for
    pooled features that are kept, 202 MB for logits. Of images that were not added nothing is in memory, so processes
    that share a set share this, too.

    Args:
        num_images (`int`): Images of the whole set.
        statistics (`Sequence[str]`, *optional*, defaults to `("pool", "spatial")`): Layers whose mean and covariance
            are computed: all that FID and sFID need.
        keep (`Sequence[str]`, *optional*, defaults to `("pool", "logits")`): Layers whose features are kept, in
            float32: what KID, precision and recall (`"pool"`) and the Inception Score (`"logits"`) need.

    Raises:
        ValueError: If `num_images` is not positive, or no layer is named.
    """

    def __init__(
        self,
        num_images: int,
        statistics: Sequence[str] = ("pool", "spatial"),
        keep: Sequence[str] = ("pool", "logits"),
    ):
        if num_images < 1 or not (statistics or keep):
            raise ValueError(f"`num_images` must be positive, got {num_images}, and a layer be named.")
        self.seen = np.zeros(num_images, dtype=bool)
        self._statistics: dict[str, RunningMoments | None] = dict.fromkeys(statistics)
        self._kept: dict[str, np.ndarray | None] = dict.fromkeys(keep)

    @property
    def num_images(self) -> int:
        """`int`: Images of the whole set."""
        return len(self.seen)

    @property
    def layers(self) -> tuple[list[str], list[str]]:
        """`tuple[list[str], list[str]]`: Names of the layers with statistics, and of those whose features are kept."""
        return list(self._statistics), list(self._kept)

    def update(self, rows: Sequence[int], features: Mapping[str, torch.Tensor]) -> None:
        """
        Add images.

        Args:
            rows (`Sequence[int]`): Their indices.
            features (`Mapping[str, torch.Tensor]`): What the extractor gave of them, of shape `(len(rows), dim)` each.

        Raises:
            ValueError: If an image is none of the set or was counted before, or a layer is missing, of another
                length or not finite.
        """
        rows = np.asarray(rows, dtype=np.int64)
        self._check_rows(rows)
        layers = self._statistics.keys() | self._kept.keys()
        if layers - features.keys():
            raise ValueError(
                f"the extractor gives {', '.join(map(repr, features))}, but not {sorted(layers - features.keys())}: "
                "leave out what needs these layers, or choose another extractor."
            )
        for name in layers:
            shape = tuple(features[name].shape)
            if len(shape) != 2 or shape[0] != len(rows):
                raise ValueError(
                    f"the extractor gave {name!r} of shape {shape} for {len(rows)} images: it must be (n, dim)."
                )
            if not features[name].isfinite().all():
                raise ValueError(
                    f"the extractor's {name!r} are not finite: run it in float32, and look at the images."
                )
        for name in self._statistics:
            self._statistics_of(name, features[name].shape[1]).update(features[name].cpu())
        for name in self._kept:
            self._array_of(name, features[name].shape[1])[rows] = features[name].float().cpu().numpy()
        self.seen[rows] = True

    def merge(self, other: "FeatureCollector") -> None:
        """
        Add what another process collected.

        Args:
            other ([`FeatureCollector`]): Of the same layers and the same set.

        Raises:
            ValueError: If it is of another set, or both counted an image.
        """
        if other.num_images != self.num_images or self.layers != other.layers:
            raise ValueError("`other` must be of the same layers and of as many images.")
        rows = np.flatnonzero(other.seen)
        self._check_rows(rows)
        if len(rows) == 0:
            return
        for name, statistics in other._statistics.items():
            self._statistics_of(name, len(statistics.mean)).merge(statistics)
        for name, values in other._kept.items():
            self._array_of(name, values.shape[1])[rows] = values[rows]
        self.seen[rows] = True

    @classmethod
    def merged(cls, collectors: Iterable["FeatureCollector"]) -> "FeatureCollector":
        """
        What all processes collected.

        Args:
            collectors (`Iterable[FeatureCollector]`): At least one; may be loaded one by one.

        Raises:
            ValueError: If they do not fit together, or an image was counted twice.
        """
        collectors = iter(collectors)
        first = next(collectors)
        for other in collectors:
            first.merge(other)
        return first

    def moments(self, layer: str) -> Moments:
        """
        Mean and covariance over all images.

        Args:
            layer (`str`): One of `statistics`.

        Returns:
            [`Moments`]: In float64.

        Raises:
            ValueError: If images are missing.
        """
        self._check_complete()
        return feature_moments(self._statistics[layer])

    def features(self, layer: str) -> torch.Tensor:
        """
        Features of all images.

        Args:
            layer (`str`): One of `keep`.

        Returns:
            `torch.FloatTensor` of shape `(num_images, dim)`: By image index, not a copy.

        Raises:
            ValueError: If images are missing.
        """
        self._check_complete()
        return torch.from_numpy(self._kept[layer])

    def save(self, path: str | Path, protocol: Mapping[str, Any]) -> None:
        """
        Write everything, to be merged or continued; the file is whole or absent.

        Args:
            path (`str` or `Path`): The file, of this process alone.
            protocol (`Mapping[str, Any]`): What must be the same when it is loaded, such as the extractor's digest and
                the images; plain types.
        """
        arrays = {"seen": self.seen, "protocol": np.array(json.dumps(dict(protocol), sort_keys=True))}
        arrays["layers"] = np.array(json.dumps(self.layers))
        if self.seen.any():
            arrays |= {f"statistics_{name}": value.state().numpy() for name, value in self._statistics.items()}
            rows = slice(None) if self.seen.all() else self.seen  # a slice is not copied
            arrays |= {f"kept_{name}": values[rows] for name, values in self._kept.items()}
        write_arrays(path, arrays)

    @classmethod
    def load(cls, path: str | Path, protocol: Mapping[str, Any]) -> "FeatureCollector":
        """
        Read what [`~FeatureCollector.save`] wrote.

        Args:
            path (`str` or `Path`): The file.
            protocol (`Mapping[str, Any]`): What it must be of.

        Returns:
            [`FeatureCollector`]: To be continued with the images that are not `seen`.

        Raises:
            ValueError: If the file is of another protocol.
        """
        with np.load(path, allow_pickle=False) as file:
            recorded = json.loads(str(file["protocol"]))
            if recorded != json.loads(json.dumps(dict(protocol))):
                raise ValueError(
                    f"{path} holds features of another protocol, {recorded} there and {dict(protocol)} now: use that "
                    "one, or remove the file."
                )
            seen = file["seen"]
            collector = cls(len(seen), *json.loads(str(file["layers"])))
            collector.seen = seen
            if seen.any():
                for name in collector._statistics:
                    state = torch.from_numpy(file[f"statistics_{name}"])
                    collector._statistics[name] = RunningMoments.merged([state])
                for name in collector._kept:
                    rows = file[f"kept_{name}"]
                    collector._array_of(name, rows.shape[1])[seen] = rows
        return collector

    def _statistics_of(self, name: str, dim: int) -> RunningMoments:
        if self._statistics[name] is None:
            self._statistics[name] = RunningMoments.zeros(dim)
        return self._statistics[name]

    def _array_of(self, name: str, dim: int) -> np.ndarray:
        if self._kept[name] is None:
            # the system gives memory to rows when they are written
            self._kept[name] = np.zeros((self.num_images, dim), dtype=np.float32)
        return self._kept[name]

    def _check_rows(self, rows: np.ndarray) -> None:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.num_images:
            raise ValueError(f"`rows` must be from 0 to {self.num_images - 1}, got {rows.min()} to {rows.max()}.")
        indices, counts = np.unique(rows, return_counts=True)
        twice = indices[(counts > 1) | self.seen[indices]]
        if len(twice):
            raise ValueError(f"image {twice[0]} ({len(twice)} in all) would be counted twice.")

    def _check_complete(self) -> None:
        missing = np.flatnonzero(~self.seen)
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {self.num_images} images were not counted, the first is image {missing[0]}: merge "
                "the collectors of all processes, or continue the run."
            )


def collect_features(
    images: ImageReader,
    extractor: FeatureExtractor,
    collector: FeatureCollector,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
    seen: np.ndarray | None = None,
) -> None:
    """
    Add the images of a process that the collector has not seen.

    Args:
        images ([`ImageReader`]): The set.
        extractor ([`FeatureExtractor`]): What computes features.
        collector ([`FeatureCollector`]): Where they go.
        batch_size (`int`): Images at a time.
        rank (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        on_batch (`Callable[[int], None]`, *optional*): Called after every batch with its number of images, for a
            progress bar or to save the collector.
        seen (`numpy.ndarray` of shape `(num_images,)`, *optional*): True for images to leave out, bool, by default
            those that the collector has. To continue on another number of processes, give each the images that all
            parts of the earlier run have together.

    Raises:
        ValueError: If collector and set differ in their number of images, or an image cannot be read.
    """
    if len(images) != collector.num_images:
        raise ValueError(
            f"`collector` is for {collector.num_images} images, but {images.description} is read for {len(images)}."
        )
    seen = np.array(collector.seen if seen is None else seen)
    for rows, batch in images.batches(batch_size, rank, world_size, seen):
        collector.update(rows, extractor(batch))
        if on_batch is not None:
            on_batch(len(rows))
