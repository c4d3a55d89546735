"""Sets of images at the scale of an evaluation: every image by its own seed, on disk once, with its protocol."""

from .classes import describe_counts, draw_labels, select_classes
from .generation import generate_images, split_into_batches
from .image_set import ImageSet
from .loading import load_pipeline
from .npz import npz_size, write_npz
from .options import GenerateOptions
from .pixels import to_uint8
from .protocol import (
    check_free_space,
    image_shape,
    make_scheduler,
    record_settings,
    resolve_sampling,
    run_settings,
    sampling_settings,
)


__all__ = [
    "GenerateOptions",
    "ImageSet",
    "check_free_space",
    "describe_counts",
    "draw_labels",
    "generate_images",
    "image_shape",
    "load_pipeline",
    "make_scheduler",
    "npz_size",
    "record_settings",
    "resolve_sampling",
    "run_settings",
    "sampling_settings",
    "select_classes",
    "split_into_batches",
    "to_uint8",
    "write_npz",
]
