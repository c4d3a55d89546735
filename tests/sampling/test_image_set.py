"""A folder of images: each is there whole or not at all."""

import json

import numpy as np
import PIL.Image
import pytest

from maetok_hf.sampling import ImageSet


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path):
    images = ImageSet(tmp_path / "images", 3)
    for index in range(3):
        images.write(index, pixels(index))
    return images


def test_images_come_back_in_order_bit_for_bit(images):
    for index, read in enumerate(images.read()):
        assert (read == pixels(index)).all()
    assert index == 2
    assert [path.name for path in sorted(images.folder.iterdir())] == ["000000.png", "000001.png", "000002.png"]


def test_names_of_a_large_set_sort_by_index():
    images = ImageSet("x", 10_000_001)
    assert images.path(7).name == "00000007.png"


def test_missing_images_are_those_without_a_whole_file(tmp_path, images, monkeypatch):
    assert ImageSet(tmp_path / "none", 2).missing() == [0, 1]
    assert images.missing() == []
    images.path(1).unlink()

    def save_half(self, file, **keywords):
        file.write(b"\x89PNG half")
        raise KeyboardInterrupt

    monkeypatch.setattr(PIL.Image.Image, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        images.write(1, pixels(1))
    assert images.missing() == [1]
    assert len(list(images.folder.iterdir())) == 3
    images.remove_partial()
    assert len(list(images.folder.iterdir())) == 2


def test_broken_file_is_named(images):
    whole = images.path(1).read_bytes()
    for damage in (whole[:40], b""):
        images.path(1).write_bytes(damage)
        with pytest.raises(ValueError, match="000001.png cannot be read .*: remove it"):
            list(images.read())


def test_datasets_reads_the_folder_with_its_classes(images, tmp_path):
    from datasets import load_dataset

    images.write_metadata([7, 9, 8])
    rows = [json.loads(line) for line in (images.folder / "metadata.jsonl").read_text().splitlines()]
    assert rows[1] == {"file_name": "000001.png", "label": 9}
    table = load_dataset("imagefolder", data_dir=str(images.folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["label"] == [7, 9, 8]
    assert (np.asarray(table[2]["image"]) == pixels(2)).all()


def test_removal_takes_what_the_set_wrote_and_nothing_else(images):
    images.write_metadata([0, 1, 2])
    (images.folder / "mine.png").write_bytes(b"")
    images.remove()
    assert [path.name for path in images.folder.iterdir()] == ["mine.png"]
    (images.folder / "mine.png").unlink()
    images.remove()
    assert not images.folder.exists()
    images.remove()
