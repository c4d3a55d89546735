"""A folder of numbered PNG files that can be filled by many processes, and continued after any of them was killed."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


METADATA_FILE = "metadata.jsonl"


class ImageSet:
    """
    The images `0 .. num_images - 1` of a set, one PNG file each.

    A file is written under a temporary name, flushed to the disk and renamed, so that an image is there whole or not
    at all. Several processes may write at the same time.

    Args:
        folder (`str` or `Path`): Folder of the files; [`~ImageSet.write`] makes it.
        num_images (`int`): Images of the whole set.
    """

    def __init__(self, folder: str | Path, num_images: int):
        self.folder, self.num_images = Path(folder), num_images
        self._digits = max(6, len(str(num_images - 1)))

    def path(self, index: int) -> Path:
        """Where an image is; the names have one width, so that they sort by index."""
        return self.folder / f"{index:0{self._digits}d}.png"

    def missing(self) -> list[int]:
        """Indices of the images that are not there, in order; one look at the folder."""
        if not self.folder.is_dir():
            return list(range(self.num_images))
        names = set(os.listdir(self.folder))
        return [index for index in range(self.num_images) if self.path(index).name not in names]

    def write(self, index: int, pixels: np.ndarray) -> None:
        """
        Add an image, or replace it.

        Args:
            index (`int`): Its index.
            pixels (`numpy.ndarray` of shape `(height, width, 3)`): The image, uint8.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(index)
        # a process of an earlier run may still be ending: no two may write the same temporary file
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            # at this level a photograph takes a sixth more room than at the default one and a third of the time
            Image.fromarray(pixels).save(file, format="PNG", compress_level=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def read(self, start: int = 0) -> Iterator[np.ndarray]:
        """
        The images in order, one at a time.

        Args:
            start (`int`, *optional*, defaults to 0): Index of the first one.

        Yields:
            `numpy.ndarray` of shape `(height, width, 3)`: uint8.

        Raises:
            ValueError: If a file is missing or cannot be read.
        """
        for index in range(start, self.num_images):
            path = self.path(index)
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image)
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error}): remove it, and give the same command.") from error
            yield pixels

    def write_metadata(self, labels: Sequence[int]) -> None:
        """
        Write `metadata.jsonl` with the class of every image, as the `imagefolder` of `datasets` reads it.

        Args:
            labels (`Sequence[int]`): Classes by image index.
        """
        rows = ({"file_name": self.path(index).name, "label": int(label)} for index, label in enumerate(labels))
        temporary = self.folder / f".{METADATA_FILE}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / METADATA_FILE)

    def remove_partial(self) -> None:
        """Remove what killed processes left unfinished; to be called while no other process writes."""
        for path in self.folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the images and their metadata, and the folder if nothing else is in it."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if path.name == METADATA_FILE or re.fullmatch(rf"\d{{{self._digits}}}\.png", path.name):
                path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
