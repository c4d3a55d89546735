"""Which images are analysed, and whether they can tell what is asked for.

Images are chosen by their rows in the data set, so that every tokenizer and every cache of the same images is measured
on the same training and the same held-out images.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..data import ImageSource, open_images
from ..data.sources import DatasetSource, ParquetSource
from ..seeding import keyed_generator
from ..training.checkpointing import data_identity
from ..training.model_card import public_name
from .options import HELD_OUT_SHARE, AnalysisOptions


SIDES = ("train", "held_out")


def draw_rows(options: AnalysisOptions, num_rows: int, num_held_out_rows: int | None = None) -> dict[str, np.ndarray]:
    """
    Choose images by the seed.

    Args:
        options ([`AnalysisOptions`]): How many.
        num_rows (`int`): Rows of the split with the training images.
        num_held_out_rows (`int`, *optional*): Rows of that with the held-out images, if it is another.

    Returns:
        `dict[str, np.ndarray]`: Ascending rows of each of `SIDES`.

    Raises:
        ValueError: If there are not so many rows.
    """

    def drawn(purpose: str, size: int) -> np.ndarray:
        return torch.randperm(size, generator=keyed_generator(options.seed, purpose)).numpy()

    order, held_out, wanted = drawn("analysis_train", num_rows), None, options.num_held_out_images
    if num_held_out_rows is None:
        wanted = wanted or max(1, round((options.held_out_share or HELD_OUT_SHARE) * num_rows))
        if wanted > num_rows - 2:
            raise ValueError(
                f"`num_held_out_images` is {wanted}, but `split` {options.split!r} has {num_rows} images, of which at "
                "least 2 must remain for training: hold out fewer, or name a `held_out_split`."
            )
        order, held_out = order[wanted:], order[:wanted]
    else:
        held_out = drawn("analysis_held_out", num_held_out_rows)
    for name, asked, available in (
        ("num_train_images", options.num_train_images, len(order)),
        ("num_held_out_images", wanted, len(held_out)),
    ):
        if asked is not None and asked > available:
            raise ValueError(f"`{name}` is {asked}, but there are only {available} images for it: take fewer.")
    return {"train": np.sort(order[: options.num_train_images]), "held_out": np.sort(held_out[:wanted])}


class ImageData:
    """
    The images that are encoded, and what is known of their classes before.

    Args:
        options ([`AnalysisOptions`]): Which data set, and which images of it.

    Raises:
        ValueError: If splits or columns are missing, or `options` ask for more images than there are.
        OSError: If the data set does not exist or cannot be reached.
    """

    def __init__(self, options: AnalysisOptions):
        train = self._open(options, options.split)
        same = options.held_out_split in (None, options.split)
        if options.held_out_split == options.split:
            raise ValueError(f"`held_out_split` is `split` {options.split!r}: leave it out, and a share is held out.")
        self.sources = {"train": train, "held_out": train if same else self._open(options, options.held_out_split)}
        names = [source.columns.class_names for source in self.sources.values()]
        if names[0] != names[1]:
            raise ValueError(f"The classes of `split` and `held_out_split` differ: {names[0]} and {names[1]}.")
        self.class_names = names[0]
        self.has_labels = all(source.columns.label is not None for source in self.sources.values())
        self.rows = draw_rows(options, train.num_rows, None if same else self.sources["held_out"].num_rows)

    @staticmethod
    def _open(options: AnalysisOptions, split: str) -> ImageSource:
        return open_images(
            options.dataset,
            split=split,
            name=options.dataset_config_name,
            revision=options.dataset_revision,
            image_column=options.image_column,
            label_column=options.label_column,
            cache_dir=options.cache_dir,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """`dict[str, Any]`: What makes the images the same ones."""
        return {side: data_identity(self.sources[side]) for side in SIDES}

    def known_labels(self, side: str) -> np.ndarray | None:
        """
        Classes of the chosen rows, where they can be had without the images.

        Args:
            side (`str`): One of `SIDES`.

        Returns:
            `np.ndarray`, *optional*: int64, -1 for a missing class; `None` where only encoding will tell.
        """
        source = self.sources[side]
        if source.columns.label is None:
            return None
        columns, chunks = source.columns, range(len(source.chunk_sizes))
        if isinstance(source, ParquetSource) and not any("://" in file for file in source.files):
            parts = (source.read_table(chunk, [columns.label])[columns.label].to_pylist() for chunk in chunks)
        elif isinstance(source, DatasetSource):
            parts = [source.dataset[columns.label]]
        else:
            return None
        labels = [columns.label_index(value) for value in itertools.chain.from_iterable(parts)]
        return np.array(labels, dtype=np.int64)[self.rows[side]]


def describe_images(options: AnalysisOptions) -> str:
    """The data set in words, without places on this machine."""
    if options.dataset is None:
        return "the images of the cached latents"
    words = [public_name(options.dataset), options.dataset_config_name, options.dataset_revision]
    return " ".join(filter(None, words))


def check_classes(options: AnalysisOptions, what: str, has_labels: bool, class_names: tuple[str, ...] | None) -> None:
    """Refuse data without classes, or with one, if a part needs them."""
    if not options.needs_labels:
        return
    without = "or leave 'probe' and 'umap' out of `parts`"
    if not has_labels:
        raise ValueError(f"{what} has no class labels: name their column by `label_column`, {without}.")
    if class_names is not None and len(class_names) < 2:
        raise ValueError(f"{what} has a single class, {class_names}: take a data set of more, {without}.")


def check_known_labels(
    options: AnalysisOptions, labels: Mapping[str, np.ndarray | None], rows: Mapping[str, np.ndarray]
) -> None:
    """Look at what is known of the classes before the images are read."""
    counts = {side: len(rows[side]) if labels[side] is None else int((labels[side] >= 0).sum()) for side in SIDES}
    check_counts(options, counts)
    if labels["train"] is not None:
        check_num_classes(options, np.unique(labels["train"][labels["train"] >= 0]))


def check_num_classes(options: AnalysisOptions, classes: Any) -> None:
    """
    Refuse a probe of a single class.

    Args:
        options ([`AnalysisOptions`]): What is asked for.
        classes (`Any`): The classes of the training images, each once.

    Raises:
        ValueError: If there is one, and a part needs two.
    """
    if options.needs_labels and len(classes) < 2:
        raise ValueError(
            f"All training images are of a single class, {list(map(int, classes))}: take more images or a data set of "
            "more classes, or leave 'probe' and 'umap' out of `parts`."
        )


def check_counts(options: AnalysisOptions, counts: Mapping[str, int]) -> None:
    """
    Refuse to measure what so few images cannot tell.

    Args:
        options ([`AnalysisOptions`]): What is asked for.
        counts (`Mapping[str, int]`): Images of each of `SIDES`.

    Raises:
        ValueError: If there are too few.
    """
    train = counts["train"]
    if train < 2 or counts["held_out"] < 1:
        raise ValueError(
            f"There are {train} training and {counts['held_out']} held-out images that can be used, but at least 2 "
            "and 1 are needed: take more of them."
        )
    if "mixtures" in options.parts and max(options.mixture_sizes) > train:
        raise ValueError(
            f"`mixture_sizes` go up to {max(options.mixture_sizes)} components, but there are {train} training "
            "images: take smaller mixtures, more images, or leave 'mixtures' out of `parts`."
        )
    if "umap" in options.parts and options.umap_num_neighbors >= min(train, options.umap_num_images):
        raise ValueError(
            f"`umap_num_neighbors` is {options.umap_num_neighbors}, but the picture has "
            f"{min(train, options.umap_num_images)} images: take fewer neighbours, or leave 'umap' out of `parts`."
        )
