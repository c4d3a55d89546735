"""Image data sets: streamed, shuffled and resumed exactly, on any number of processes and data workers."""

from .columns import ImageColumns, find_columns
from .held_out import HeldOutImages
from .mnist import export_mnist
from .opening import open_images
from .sources import CorruptImageError, ImageSource
from .streaming import StreamingImages
from .transforms import ImageTransform, to_rgb


__all__ = [
    "CorruptImageError",
    "HeldOutImages",
    "ImageColumns",
    "ImageSource",
    "ImageTransform",
    "StreamingImages",
    "export_mnist",
    "find_columns",
    "open_images",
    "to_rgb",
]
