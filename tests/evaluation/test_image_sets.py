"""Sets of images are read in parts, each image once on any number of processes."""

import tracemalloc

import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.data import open_images
from maetok_hf.evaluation import DatasetImages, FolderImages, NpzImages, open_image_set
from maetok_hf.evaluation.image_sets import image_set_identity, split_rows
from maetok_hf.sampling import write_npz
from tests.evaluation.networks import random_images


COUNT = 13


@pytest.fixture(scope="module")
def images():
    return random_images(COUNT)


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory):
    """The same images in every format."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    folder = tmp_path_factory.mktemp("sets")
    (folder / "png").mkdir()
    for index, image in enumerate(pixels):
        PIL.Image.fromarray(image).save(folder / "png" / f"{index:06d}.png")
    write_npz(folder / "written.npz", iter(pixels), pixels.shape, np.arange(COUNT))
    np.savez(folder / "saved.npz", pixels)
    np.savez_compressed(folder / "packed.npz", pixels)
    source = open_images(folder / "png", cache_dir=folder / "cache")
    return {
        "folder": FolderImages(folder / "png"),
        "written": NpzImages(folder / "written.npz"),
        "saved": NpzImages(folder / "saved.npz"),
        "packed": NpzImages(folder / "packed.npz"),
        "dataset": DatasetImages(source, resolution=12),
    }


FORMATS = ("folder", "written", "saved", "packed", "dataset")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("batch_size,world_size", [(1, 1), (4, 1), (4, 2), (4, 5), (50, 3)])
def test_processes_read_every_image_once(sets, images, name, batch_size, world_size):
    rows = []
    for rank in range(world_size):
        for found, batch in sets[name].batches(batch_size, rank, world_size):
            assert batch.dtype == torch.uint8
            assert torch.equal(batch, images[found.start : found.stop])
            rows += found
    assert sorted(rows) == list(range(COUNT))


@pytest.mark.parametrize("name", FORMATS)
def test_images_that_were_seen_are_left_out(sets, images, name):
    seen = np.zeros(COUNT, dtype=bool)
    seen[[0, 1, 2, 3, 5, 10]] = True
    rows = []
    for rank in range(2):
        for found, batch in sets[name].batches(4, rank, 2, seen):
            assert torch.equal(batch, images[found.start : found.stop])
            rows += found
    assert sorted(rows) == np.flatnonzero(~seen).tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_can_be_read_in_any_order(sets, images, name):
    for rows in (range(9, 12), range(0, 2), range(12, 13)):
        assert torch.equal(sets[name].read(rows), images[rows.start : rows.stop])


def test_a_batch_holds_the_same_images_on_any_number_of_processes():
    alone = list(split_rows(50, 8))
    shared = [list(split_rows(50, 8, rank, 3)) for rank in range(3)]
    assert shared == [alone[0::3], alone[1::3], alone[2::3]]


def test_num_images_takes_the_first_ones(sets, images):
    for reader in (
        open_image_set(sets["folder"].folder, 5),
        open_image_set(sets["saved"].path, 5),
        DatasetImages(sets["dataset"].source, 12, 5),
    ):
        assert len(reader) == 5
        batches = [batch for _, batch in reader.batches(3)]
        assert torch.equal(torch.cat(batches), images[:5])
    with pytest.raises(ValueError, match="`num_images` must be from 1 to 13, the images of folder .*got 14"):
        open_image_set(sets["folder"].folder, 14)


def test_folder_is_read_by_path_with_subfolders_and_without_hidden_files(tmp_path):
    for number, name in enumerate(["b/1.png", "a/2.png", "a/10.PNG", ".x/0.png", "a/.3.png.tmp", "a/.4.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("L", (3, 2), number).save(tmp_path / name, format="PNG")
    (tmp_path / "metadata.jsonl").write_text("{}")
    reader = FolderImages(tmp_path)
    assert reader.files == ["a/10.PNG", "a/2.png", "b/1.png"]
    assert reader.read(range(3)).shape == (3, 3, 2, 3)
    assert reader.read(range(3))[:, 0, 0, 0].tolist() == [2, 1, 0]


def test_folder_names_the_image_that_is_damaged_or_of_another_size(tmp_path):
    for index in range(3):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    reader = FolderImages(tmp_path)
    PIL.Image.new("RGB", (4, 5)).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png has 5 x 4 pixels but 0\.png 4 x 4.*DatasetImages"):
        list(reader.batches(2))
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        list(reader.batches(2))
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png cannot be read.*No such file"):
        list(reader.batches(2))


def test_corrupt_row_of_a_data_set_is_not_left_out_silently(tmp_path):
    for index in range(3):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    reader = DatasetImages(open_images(tmp_path, cache_dir=tmp_path / "cache"), resolution=4)
    with pytest.raises(ValueError, match="row 1 of .* is no usable image"):
        list(reader.batches(2))


def test_wrong_files_are_named(tmp_path):
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"must be uint8 of shape \(n, height, width, 3\).*got float32"):
        NpzImages(tmp_path / "floats.npz")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"holds mu\.npy, sigma\.npy, but no arr_0\.npy.*load_moments"):
        NpzImages(tmp_path / "statistics.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "floats.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"cut\.npz is no whole \.npz file"):
        NpzImages(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="neither a folder of images nor an .npz file"):
        open_image_set(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`folder` .* is no folder"):
        FolderImages(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' has no images"):
        FolderImages(tmp_path / "empty", 5)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"batch_size": 2, "rank": 2, "world_size": 2}, {"batch_size": 2, "rank": -1}]
)
def test_impossible_shares_are_refused(arguments):
    with pytest.raises(ValueError, match="`batch_size` must be positive and `rank`"):
        list(split_rows(5, **arguments))
    with pytest.raises(ValueError, match="for each of 5 images, got 4"):
        list(split_rows(5, 2, seen=np.zeros(4, dtype=bool)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_file_is_never_in_memory(tmp_path, save):
    save(tmp_path / "large.npz", np.zeros((2000, 64, 64, 3), np.uint8))  # 25 MB
    tracemalloc.start()
    count = sum(len(rows) for rows, _ in NpzImages(tmp_path / "large.npz").batches(20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 5e6


def test_a_set_is_recognized_wherever_it_lies(tmp_path):
    def identity(pixels, name):
        np.savez(tmp_path / name, pixels.permute(0, 2, 3, 1).numpy())
        return image_set_identity(NpzImages(tmp_path / name))

    images = random_images(20)
    found = identity(images, "a.npz")
    assert found == identity(images, "b.npz")
    assert (found["num_images"], found["size"]) == (20, [12, 12])
    assert identity(images[:19], "c.npz") != found
    assert identity(255 - images, "d.npz")["digest"] != found["digest"]
    assert image_set_identity(NpzImages(tmp_path / "a.npz", 1))["num_images"] == 1


@pytest.mark.parametrize("kind", ["folder", "npz", "dataset"])
def test_a_set_with_another_image_is_another_set_although_few_are_compared(tmp_path, kind):
    """Of 200 images 8 are compared by their pixels; the one that changes is none of them."""
    images = random_images(200)

    def identity(pixels, name):
        if kind == "npz":
            np.savez(tmp_path / f"{name}.npz", pixels.permute(0, 2, 3, 1).numpy())
            return image_set_identity(NpzImages(tmp_path / f"{name}.npz"))
        folder = tmp_path / name / "train" / "a"
        folder.mkdir(parents=True)
        for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            PIL.Image.fromarray(image).save(folder / f"{index:06d}.png")
        if kind == "folder":
            return image_set_identity(FolderImages(tmp_path / name))
        source = open_images(str(tmp_path / name), split="train", use_labels=False, cache_dir=tmp_path / "counts")
        return image_set_identity(DatasetImages(source, 12))

    changed = images.clone()
    changed[5] = 0
    assert identity(images, "a") == identity(images, "b") != identity(changed, "c")


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set" / "own").mkdir(parents=True)
    for folder in ("elsewhere", "set/own"):
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / folder / "0.tif")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    assert FolderImages(tmp_path / "set").files == ["linked/0.tif", "own/0.tif"]
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    with pytest.raises(ValueError, match="twice, by links"):
        FolderImages(tmp_path / "set")
