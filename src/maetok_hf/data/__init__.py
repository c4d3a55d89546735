"""Image data sets: streamed, shuffled and resumed exactly, on any number of processes and data workers."""

from .columns import ImageColumns, find_columns
from .counts import COUNT_NAMES, describe_counts
from .held_out import HeldOutImages
from .mnist import export_mnist
from .opening import open_images
from .order import resolution_at
from .sources import CorruptImageError, ImageSource
from .streaming import StreamingImages
from .transforms import ImageTransform, to_pixel_values, to_rgb


__all__ = [
    "COUNT_NAMES",
    "CorruptImageError",
    "HeldOutImages",
    "ImageColumns",
    "ImageSource",
    "ImageTransform",
    "StreamingImages",
    "describe_counts",
    "export_mnist",
    "find_columns",
    "open_images",
    "resolution_at",
    "to_pixel_values",
    "to_rgb",
]
