"""The file for the evaluation suite of ADM: as `numpy.savez` would write it, but image by image."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from maetok_hf.sampling import npz_size, write_npz


SHAPE = (7, 5, 4, 3)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)


def test_file_holds_the_arrays_that_numpy_would_save(tmp_path, images):
    labels = np.arange(7)
    write_npz(tmp_path / "samples.npz", iter(images), SHAPE, labels)
    np.savez(tmp_path / "expected.npz", images, labels)
    with np.load(tmp_path / "samples.npz") as got, np.load(tmp_path / "expected.npz") as expected:
        assert got.files == expected.files == ["arr_0", "arr_1"]
        for name in got.files:
            assert got[name].dtype == expected[name].dtype
            assert (got[name] == expected[name]).all()
    with zipfile.ZipFile(tmp_path / "samples.npz") as got, zipfile.ZipFile(tmp_path / "expected.npz") as expected:
        assert got.testzip() is None
        for name in ("arr_0.npy", "arr_1.npy"):
            assert got.read(name) == expected.read(name)
            assert got.getinfo(name).compress_type == zipfile.ZIP_STORED
    assert abs((tmp_path / "samples.npz").stat().st_size - npz_size(SHAPE)) < 4096


def test_same_images_give_the_same_file(tmp_path, images):
    for name in ("one", "other"):
        write_npz(tmp_path / name, images, SHAPE, np.zeros(7))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    shape = (400, 64, 64, 3)
    tracemalloc.start()
    write_npz(tmp_path / "x.npz", (np.full(shape[1:], i % 256, np.uint8) for i in range(400)), shape, np.zeros(400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * np.prod(shape)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda images: images[:6], "must hold 7 images, got 6"),
        (lambda images: np.concatenate([images, images[:2]]), "must hold 7 images, got 9"),
        (lambda images: images[:, :4], r"image 0 must be of shape \(5, 4, 3\)"),
        (lambda images: images.astype(np.float32), "and type uint8, got .* float32"),
    ],
)
def test_anything_but_exactly_the_set_leaves_no_file(tmp_path, images, damage, message):
    with pytest.raises(ValueError, match=message):
        write_npz(tmp_path / "samples.npz", damage(images), SHAPE, np.zeros(7))
    assert list(tmp_path.iterdir()) == []


def test_labels_must_be_as_many_as_images(tmp_path, images):
    with pytest.raises(ValueError, match="one entry for each of 7 images, got 6"):
        write_npz(tmp_path / "samples.npz", images, SHAPE, np.zeros(6))


def test_earlier_file_stays_until_the_new_one_is_whole(tmp_path, images):
    write_npz(tmp_path / "samples.npz", images, SHAPE, np.zeros(7))
    before = (tmp_path / "samples.npz").read_bytes()

    def stopped():
        yield from images[:3]
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        write_npz(tmp_path / "samples.npz", stopped(), SHAPE, np.ones(7))
    assert (tmp_path / "samples.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
