"""Image data sets: streamed, shuffled and resumed exactly, on any number of processes and data workers."""

from .columns import ImageColumns, find_columns
from .counts import COUNT_NAMES, RowCounts, describe_counts
from .held_out import HeldOutImages
from .image_ranges import ImageRanges
from .latent_shards import LatentLayout, ShardWriter, describe_shards, read_shard
from .latents import LatentSource, StreamingLatents, open_latents
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
    "ImageRanges",
    "ImageSource",
    "ImageTransform",
    "LatentLayout",
    "LatentSource",
    "RowCounts",
    "ShardWriter",
    "StreamingImages",
    "StreamingLatents",
    "describe_counts",
    "describe_shards",
    "export_mnist",
    "find_columns",
    "open_images",
    "open_latents",
    "read_shard",
    "resolution_at",
    "to_pixel_values",
    "to_rgb",
]
