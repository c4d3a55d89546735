"""Sets of images to be scored, read in parts: a folder, an `.npz` file of ADM's suite, a data set. Each image once."""

import abc
import contextlib
import hashlib
import os
import struct
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import CorruptImageError, ImageRanges, ImageSource
from ..data.sources import decode_image
from ..training.checkpointing import data_identity


EXTENSIONS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
NUM_THREADS = 8
# of the header of an entry in a zip archive: where the lengths of its name and its extra field are, and its own length
ZIP_LENGTHS, ZIP_HEADER = 26, 30
NPZ_ENTRY = "arr_0.npy"
# of a set, to know it again
NUM_COMPARED_IMAGES = 8


def split_rows(
    num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seen: np.ndarray | None = None
) -> Iterator[range]:
    """
    The images of a process: batches `rank`, `rank + world_size`, ... of all. A batch holds the same images on any
    number of processes.

    Args:
        num_images (`int`): Images of the set.
        batch_size (`int`): Images of a batch, fewer in the last one.
        rank (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes.
        seen (`numpy.ndarray` of shape `(num_images,)`, *optional*): True for images to leave out, bool. A batch of
            which some are left out may become several ranges.

    Yields:
        `range`: Consecutive images.

    Raises:
        ValueError: If a number is out of range.
    """
    if batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"`batch_size` must be positive and `rank` from 0 to below `world_size`, got {batch_size}, {rank} and "
            f"{world_size}."
        )
    if seen is not None and len(seen) != num_images:
        raise ValueError(f"`seen` must have an entry for each of {num_images} images, got {len(seen)}.")
    for start in range(rank * batch_size, num_images, world_size * batch_size):
        stop = min(start + batch_size, num_images)
        if seen is None:
            yield range(start, stop)
            continue
        left = np.flatnonzero(~seen[start:stop]) + start
        for run in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1):
            if len(run):
                yield range(int(run[0]), int(run[-1]) + 1)


class ImageReader(abc.ABC):
    """
    Images in a fixed order, of one size, as 8-bit tensors. Of all images two batches are in memory at a time.

    Args:
        description (`str`): What is read, for messages and protocols.
        num_available (`int`): Images there are.
        num_images (`int`, *optional*): Images to read, the first ones; by default all.

    Raises:
        ValueError: If there are fewer images than `num_images`, or none.
    """

    def __init__(self, description: str, num_available: int, num_images: int | None = None):
        self.description, self.num_available = description, num_available
        self.num_images = num_available if num_images is None else num_images
        if num_available < 1:
            raise ValueError(f"{description} has no images: check the path.")
        if not 1 <= self.num_images <= num_available:
            raise ValueError(
                f"`num_images` must be from 1 to {num_available}, the images of {description}, got {self.num_images}."
            )

    def __len__(self) -> int:
        return self.num_images

    @abc.abstractmethod
    def listing(self) -> Iterator[Any]:
        """
        What tells this set from another one besides some of its pixels, at little cost.

        Returns:
            `Iterator[Any]`: Plain values.
        """

    @abc.abstractmethod
    def read(self, rows: range) -> torch.Tensor:
        """
        Consecutive images.

        Args:
            rows (`range`): Which.

        Returns:
            `torch.ByteTensor` of shape `(len(rows), 3, height, width)`: In `[0, 255]`.

        Raises:
            ValueError: If one cannot be read, or has another size.
        """

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, seen: np.ndarray | None = None
    ) -> Iterator[tuple[range, torch.Tensor]]:
        """
        The images of a process, in order; the next batch is read while one is worked on.

        Args:
            batch_size (`int`): Images of a batch.
            rank (`int`, *optional*, defaults to 0): Number of this process.
            world_size (`int`, *optional*, defaults to 1): Number of processes.
            seen (`numpy.ndarray` of shape `(num_images,)`, *optional*): True for images to leave out, bool.

        Yields:
            `tuple[range, torch.ByteTensor]`: Indices and images, of shape `(n, 3, height, width)`.

        Raises:
            ValueError: If a number is out of range or an image cannot be read: nothing is left out silently.
        """
        pending: deque = deque()
        with ThreadPoolExecutor(1) as reader:
            for rows in split_rows(self.num_images, batch_size, rank, world_size, seen):
                pending.append((rows, reader.submit(self.read, rows)))
                if len(pending) == 2:
                    rows, images = pending.popleft()
                    yield rows, images.result()
            for rows, images in pending:
                yield rows, images.result()


class FolderImages(ImageReader):
    """
    The image files of a folder and its subfolders, sorted by their path.

    Args:
        folder (`str` or `Path`): The folder. Hidden files and folders are left out.
        num_images (`int`, *optional*): Images to read, the first ones; by default all.

    Raises:
        ValueError: If there are fewer images than `num_images`, or none.
    """

    def __init__(self, folder: str | Path, num_images: int | None = None):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"`folder` {os.fspath(folder)!r} is no folder: check the path.")
        self.files = sorted(_image_files(self.folder))
        super().__init__(f"folder {str(self.folder)!r}", len(self.files), num_images)
        self._size = self._decode(self.files[0]).shape

    def listing(self) -> Iterator[Any]:
        return ((name, (self.folder / name).stat().st_size) for name in self.files[: self.num_images])

    def read(self, rows: range) -> torch.Tensor:
        images = torch.empty(len(rows), *self._size, dtype=torch.uint8)
        with ThreadPoolExecutor(min(NUM_THREADS, len(rows))) as pool:
            for position, pixels in enumerate(pool.map(self._decode, self.files[rows.start : rows.stop])):
                if pixels.shape != self._size:
                    raise ValueError(
                        f"{self.folder / self.files[rows[position]]} has {pixels.shape[0]} x {pixels.shape[1]} pixels "
                        f"but {self.files[0]} {self._size[0]} x {self._size[1]}: bring all images to one size first, "
                        "or read them with `DatasetImages`, which crops them."
                    )
                images[position] = torch.from_numpy(pixels)
        return images.permute(0, 3, 1, 2).contiguous()

    def _decode(self, name: str) -> np.ndarray:
        path = self.folder / name
        try:
            return np.array(decode_image(path.read_bytes())[0])
        except (OSError, CorruptImageError) as error:
            raise ValueError(f"{path} cannot be read ({error}): make it again, or remove it.") from error


def _image_files(folder: Path) -> Iterator[str]:
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:  # a link to a folder that holds it, or a second one to the same folder
            raise ValueError(f"{folder} leads to {place} twice, by links: remove one of them.")
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


class NpzImages(ImageReader):
    """
    The images under `arr_0` of an `.npz` file, the format of ADM's evaluation suite, without loading the file: 50 000
    of 256 x 256 take 9.8 GB. In an uncompressed file, which `numpy.savez` writes, images are read directly; one of
    `numpy.savez_compressed` is unpacked from the beginning up to the images that are asked for.

    Args:
        path (`str` or `Path`): The file.
        num_images (`int`, *optional*): Images to read, the first ones; by default all.

    Raises:
        ValueError: If the file is damaged, or holds no uint8 array of shape `(n, height, width, 3)` of that name, or
            fewer images than `num_images`.
    """

    def __init__(self, path: str | Path, num_images: int | None = None):
        self.path = Path(path)
        try:
            archive = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is no whole .npz file ({error}): make or download it again.") from error
        if NPZ_ENTRY not in archive.namelist():
            raise ValueError(
                f"{path} holds {', '.join(archive.namelist())}, but no {NPZ_ENTRY}: images must be there. If it holds "
                "statistics, read it with `load_moments`."
            )
        self._packed = archive.open(NPZ_ENTRY)
        self._shape = _read_header(path, self._packed)
        self._offset = self._packed.tell()
        info = archive.getinfo(NPZ_ENTRY)
        self._checksum = info.CRC
        if info.compress_type == zipfile.ZIP_STORED:
            self._packed.close()
            self._packed = None
            self._offset += self._entry_offset(info)
        super().__init__(f"file {str(self.path)!r}", self._shape[0], num_images)

    def _entry_offset(self, info: zipfile.ZipInfo) -> int:
        """Where in the file an entry that is not packed begins."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + ZIP_LENGTHS)
            return info.header_offset + ZIP_HEADER + sum(struct.unpack("<HH", file.read(4)))

    def listing(self) -> Iterator[Any]:
        yield self._checksum  # of all images, from the directory of the archive

    def read(self, rows: range) -> torch.Tensor:
        size = int(np.prod(self._shape[1:]))
        with contextlib.nullcontext(self._packed) if self._packed else open(self.path, "rb") as file:
            file.seek(self._offset + rows.start * size)
            data = file.read(len(rows) * size)
        if len(data) != len(rows) * size:
            raise ValueError(f"{self.path} ends before image {rows[-1]}: make or download it again.")
        images = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return images.reshape(len(rows), *self._shape[1:]).permute(0, 3, 1, 2).contiguous()


def _read_header(path: str | Path, stream) -> tuple[int, ...]:
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = readers[version](stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order:
        raise ValueError(
            f"{NPZ_ENTRY} of {path} must be uint8 of shape (n, height, width, 3) in C order, got {dtype} of shape "
            f"{shape}{' in Fortran order' if fortran_order else ''}."
        )
    return shape


class DatasetImages(ImageReader):
    """
    The first rows of an image data set, resized and cropped at the centre as ADM does.

    Args:
        source ([`~maetok_hf.data.ImageSource`]): The data set, from [`~maetok_hf.data.open_images`].
        resolution (`int`): Height and width in pixels.
        num_images (`int`, *optional*): Rows to read; by default all.
        num_workers (`int`, *optional*, defaults to 0): Processes that decode images.

    Raises:
        ValueError: If there are fewer rows than `num_images`.
    """

    def __init__(self, source: ImageSource, resolution: int, num_images: int | None = None, num_workers: int = 0):
        super().__init__(source.description, source.num_rows, num_images)
        self.source, self.resolution, self.num_workers = source, resolution, num_workers

    def listing(self) -> Iterator[Any]:
        yield data_identity(self.source)["digest"]

    def read(self, rows: range) -> torch.Tensor:
        return next(self._read_ranges([rows], len(rows), num_workers=0))

    def batches(
        self, batch_size: int, rank: int = 0, world_size: int = 1, seen: np.ndarray | None = None
    ) -> Iterator[tuple[range, torch.Tensor]]:
        ranges = list(split_rows(self.num_images, batch_size, rank, world_size, seen))
        yield from zip(ranges, self._read_ranges(ranges, batch_size, self.num_workers), strict=True)

    def _read_ranges(self, ranges: list[range], batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        images = ImageRanges(self.source, resolution=self.resolution, batch_size=batch_size, ranges=ranges)
        for batch in images.dataloader(num_workers):
            if batch["left_out"]:
                raise ValueError(
                    f"row {batch['left_out'][0]} of {self.description} is no usable image, so that its images cannot "
                    "all be counted: remove the row, or choose a smaller `num_images`."
                )
            yield batch["images"]


def open_image_set(path: str | Path, num_images: int | None = None) -> ImageReader:
    """
    The images of a folder or of an `.npz` file.

    Args:
        path (`str` or `Path`): The folder or the file.
        num_images (`int`, *optional*): Images to read, the first ones; by default all.

    Returns:
        [`ImageReader`]: [`FolderImages`] or [`NpzImages`].

    Raises:
        ValueError: If it is neither, or holds fewer images.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, num_images)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, num_images)
    raise ValueError(f"`path` {os.fspath(path)!r} is neither a folder of images nor an .npz file: check it.")


def image_set_identity(images: ImageReader) -> dict[str, Any]:
    """
    What makes a set of images the same one, wherever it lies: the number and size of its images, the names and sizes
    of its files or the checksum of the whole, and the pixels of some images.

    Args:
        images ([`ImageReader`]): The set.

    Returns:
        `dict[str, Any]`: Plain values.
    """
    rows = torch.linspace(0, len(images) - 1, min(NUM_COMPARED_IMAGES, len(images))).round().int().tolist()
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        image = images.read(range(row, row + 1))
        digest.update(image.numpy().tobytes())
    for entry in images.listing():
        digest.update(repr(entry).encode())
    return {"num_images": len(images), "size": list(image.shape[2:]), "digest": digest.hexdigest()}
