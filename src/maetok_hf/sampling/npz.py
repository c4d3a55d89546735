"""The `.npz` file that the evaluation suite of ADM reads, written image by image: 50 000 of 256 x 256 take 9.8 GB."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import numpy as np


# of the entries in the archive: the same images give the same file
EPOCH = (1980, 1, 1, 0, 0, 0)
# headers of the archive and of its arrays
OVERHEAD = 4096


def npz_size(shape: Sequence[int]) -> int:
    """
    Bytes of the file, to within a few kilobytes.

    Args:
        shape (`Sequence[int]`): Images, height, width, 3.

    Returns:
        `int`: Bytes; the arrays are not compressed, so that they can be read in parts.
    """
    return prod(shape) + 8 * shape[0] + OVERHEAD


def write_npz(path: str | Path, images: Iterable[np.ndarray], shape: Sequence[int], labels: np.ndarray) -> None:
    """
    Write images (`arr_0`, uint8) and their classes (`arr_1`, int64); the file is whole or absent.

    No more than one image is in memory at a time.

    Args:
        path (`str` or `Path`): The file; an earlier one is replaced.
        images (`Iterable[numpy.ndarray]`): uint8 images of shape `(height, width, 3)`, in order.
        shape (`Sequence[int]`): Number of images, height, width, 3.
        labels (`numpy.ndarray` of shape `(num_images,)`): Classes.

    Raises:
        ValueError: If there are fewer or more images or labels than `shape` says, or one has another shape or type.
    """
    path, shape = Path(path), tuple(shape)
    if len(labels) != shape[0]:
        raise ValueError(f"`labels` must have one entry for each of {shape[0]} images, got {len(labels)}.")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy", EPOCH), "w", force_zip64=True) as entry:
                    _write_images(entry, images, shape)
                with archive.open(zipfile.ZipInfo("arr_1.npy", EPOCH), "w") as entry:
                    np.lib.format.write_array(entry, np.asarray(labels, dtype=np.int64))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_images(entry, images: Iterable[np.ndarray], shape: tuple[int, ...]) -> None:
    description = np.lib.format.dtype_to_descr(np.dtype(np.uint8))
    header = {"descr": description, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(entry, header)
    count = 0
    for image in images:
        if image.shape != shape[1:] or image.dtype != np.uint8:
            raise ValueError(
                f"image {count} must be of shape {shape[1:]} and type uint8, got {image.shape} and {image.dtype}."
            )
        count += 1
        if count <= shape[0]:
            entry.write(np.ascontiguousarray(image).data)
    if count != shape[0]:
        raise ValueError(f"`images` must hold {shape[0]} images, got {count}.")
