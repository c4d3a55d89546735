"""Tiny data sets of the same rows in every format that is read."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from maetok_hf.data import open_images


KINDS = ("dataset", "parquet", "imagefolder", "webdataset", "stream")
CLASS_NAMES = ["cat", "dog", "fox"]


def pixels(index: int) -> np.ndarray:
    """Pixels of row `index`, (9, 12, 3); no two rows agree."""
    return np.random.default_rng(index).integers(0, 256, (9, 12, 3), dtype=np.uint8)


def png(index: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels(index)).save(file, format="PNG")
    return file.getvalue()


def labels(num_rows: int) -> list[int]:
    # Sorted, because folders of images are.
    return [3 * index // num_rows for index in range(num_rows)]


def in_memory(images: list, classes: list, captions: list | None = None):
    from datasets import ClassLabel, Dataset, Features, Image, Value

    features = {"image": Image(), "label": ClassLabel(names=CLASS_NAMES)}
    rows = [image if isinstance(image, dict) else {"bytes": image, "path": None} for image in images]
    table = {"image": rows, "label": classes}
    if captions is not None:
        features["caption"], table["caption"] = Value("string"), captions
    return Dataset.from_dict(table, features=Features(features))


def write_tar(path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_parquet(path, dataset, row_group_size: int) -> None:
    import pyarrow.parquet as pq

    table = dataset.with_format("arrow")[:].replace_schema_metadata(dataset.features.arrow_schema.metadata)
    pq.write_table(table, path, row_group_size=row_group_size)


def cuts(num_rows: int) -> list[range]:
    """Three shards of unequal size."""
    first, second = num_rows // 4, num_rows // 4 + num_rows // 2
    return [range(first), range(first, second), range(second, num_rows)]


def build(kind: str, folder, images: list[bytes], classes: list[int], captions: list[str | None] | None = None):
    """What to pass to `open_images` for the rows in one of the `KINDS`."""
    folder.mkdir(parents=True, exist_ok=True)
    dataset = in_memory(images, classes, captions)
    if kind == "dataset":
        return dataset
    if kind == "stream":
        return dataset.to_iterable_dataset(num_shards=3)
    for shard, rows in enumerate(cuts(len(images))):
        if kind == "parquet":
            write_parquet(folder / f"train-{shard:05d}-of-00003.parquet", dataset.select(rows), row_group_size=5)
        elif kind == "webdataset":
            members = []
            for row in rows:
                members += [(f"{row:04d}.png", images[row]), (f"{row:04d}.cls", str(classes[row]).encode())]
                if captions is not None:
                    members.append((f"{row:04d}.json", json.dumps({"caption": captions[row]}).encode()))
                    members += [(f"{row:04d}.txt", captions[row].encode())] if captions[row] is not None else []
            write_tar(folder / f"train-{shard:03d}.tar", members)
        else:
            for row in rows:
                path = folder / "train" / CLASS_NAMES[classes[row]] / f"{row:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(images[row])
    if kind == "imagefolder" and captions is not None:
        files = [f"{CLASS_NAMES[label]}/{row:04d}.png" for row, label in enumerate(classes)]
        lines = zip(files, classes, captions, strict=True)
        lines = [json.dumps(dict(zip(("file_name", "label", "caption"), line, strict=True))) for line in lines]
        (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def make_source(tmp_path):
    def make(kind: str = "dataset", num_rows: int = 61, images: list | None = None, classes: list | None = None):
        images = [png(index) for index in range(num_rows)] if images is None else images
        classes = labels(len(images)) if classes is None else classes
        data = build(kind, tmp_path / kind, images, classes)
        return open_images(data, chunk_size=4, cache_dir=tmp_path / "counts")

    return make


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """The helpers of this file."""
    return SimpleNamespace(
        CLASS_NAMES=CLASS_NAMES,
        build=build,
        in_memory=in_memory,
        labels=labels,
        pixels=pixels,
        png=png,
        write_parquet=write_parquet,
        write_tar=write_tar,
    )
