"""Images that a pipeline makes while they are scored: the set that `generate.py` would write, kept nowhere."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..pipelines import MAETokDiffusionPipeline
from ..sampling import (
    GenerateOptions,
    draw_labels,
    generate_images,
    image_shape,
    resolve_sampling,
    sampling_settings,
    select_classes,
    split_into_batches,
    to_uint8,
)
from ..training.model_card import public_name
from .image_sets import ImageReader, split_rows


class PipelineImages(ImageReader):
    """
    A set of images by its options. Image i has its own noise and class, and is made in one batch with the same
    neighbours on any number of processes and after any interruption, as in a set that `generate.py` writes.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): On its device, with the scheduler that it shall sample with.
        options ([`~maetok_hf.sampling.GenerateOptions`]): What is asked for.
        digests (`dict[str, str]`, *optional*): Of the pipeline's components, shared by sets of one pipeline.

    Raises:
        ValueError: If the pipeline cannot do it, or an option has no effect.
    """

    def __init__(self, pipe: MAETokDiffusionPipeline, options: GenerateOptions, digests: dict[str, str] | None = None):
        super().__init__(f"pipeline {public_name(options.pretrained_model_name_or_path)}", options.num_images)
        self.pipe, self.options = pipe, options
        self.classes = select_classes(options.class_labels, pipe)
        self.sampling = resolve_sampling(options, pipe, self.classes)
        self._labels = draw_labels(options.num_images, self.classes, options.label_draw, options.seed)
        self._settings: dict[str, Any] | None = None
        self._digests = digests

    @property
    def settings(self) -> dict[str, Any]:
        """`dict[str, Any]`: What determines the images, as in the `settings.json` of a written set; the weights are
        read for their digests once."""
        if self._settings is None:
            self._settings = sampling_settings(self.options, self.pipe, self.classes, self.sampling, self._digests)
        return self._settings

    @property
    def shape(self) -> tuple[int, int, int]:
        """`tuple[int, int, int]`: Channels, height and width of an image."""
        height, width, channels = image_shape(self.pipe)
        return channels, height, width

    def listing(self) -> Iterator[Any]:
        yield self.settings

    def read(self, rows: range) -> torch.Tensor:
        images = torch.empty(len(rows), *self.shape, dtype=torch.uint8)
        for batch in split_into_batches(self.num_images, self.options.batch_size, rows):
            labels = self._labels[batch.start : batch.stop].tolist()
            made = generate_images(self.pipe, batch, labels, self.options.seed, **self.sampling)
            pixels = to_uint8(made, self.options.rounding).permute(0, 3, 1, 2)
            first, last = max(batch.start, rows.start), min(batch.stop, rows.stop)
            images[first - rows.start : last - rows.start] = pixels[first - batch.start : last - batch.start]
        return images

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, seen: np.ndarray | None = None
    ) -> Iterator[tuple[range, torch.Tensor]]:
        # not ahead of time in a thread: precision and device are shared with the extractor
        for rows in split_rows(self.num_images, batch_size, rank, world_size, seen):
            yield rows, self.read(rows)
