"""The emoji export, from a package of a few emoji that the test makes."""

import io
import json
import tarfile

import numpy as np
import PIL.Image
import pytest
from datasets import load_dataset

from maetok_hf.data import open_images
from maetok_hf.data.emoji import export_emoji


TONES = ("1F3FB", "1F3FC")
CATEGORIES = ["Flags", "Objects", "People & Body"]


def picture(number: int) -> PIL.Image.Image:
    """A half-transparent square whose colour tells the number, on nothing."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[16:48, 16:48] = 2 * number, 0, 7, 128
    return PIL.Image.fromarray(pixels)


def make_package(folder):
    """20 flags, two of them alike, 30 people with two skin tones, three of them in a chain of pictures, one object."""
    images = folder / "img" / "google" / "64"
    images.mkdir(parents=True)
    table, number = [], 0
    for category, count in zip(CATEGORIES, (20, 1, 30), strict=True):
        for index in range(count):
            base = f"{category[0].lower()}{index:02d}"
            entry = {"unified": base.upper(), "category": category, "image": f"{base}.png", "has_img_google": True}
            if category == CATEGORIES[2]:
                entry["skin_variations"] = {
                    tone: {"image": f"{base}-{tone.lower()}.png", "has_img_google": True} for tone in TONES
                }
            for variant in (entry, *entry.get("skin_variations", {}).values()):
                number += 1
                picture(number).save(images / variant["image"])
            table.append(entry)
    table.append({"unified": "ZZ", "category": CATEGORIES[1], "image": "zz.png", "has_img_google": False})
    # other bytes, the same pixels: nothing is seen of a colour without opacity
    pixels = np.asarray(PIL.Image.open(images / "f00.png")).copy()
    pixels[:8, :8, 0] = 99
    PIL.Image.fromarray(pixels).save(images / "f01.png")
    for same, other in (("p00-1f3fb", "p02-1f3fb"), ("p01-1f3fc", "p02-1f3fc")):
        (images / f"{other}.png").write_bytes((images / f"{same}.png").read_bytes())
    PIL.Image.new("LA", (64, 64), (5, 255)).save(images / "o00.png")
    (folder / "emoji.json").write_text(json.dumps(table[::-1]))
    (folder / "package.json").write_text(json.dumps({"name": "emoji-datasource-google", "version": "1.2.3"}))
    (folder / "img" / "google" / "sheet.png").write_bytes(b"not needed")
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("npm") / "package")


@pytest.fixture(scope="module")
def folder(package, tmp_path_factory):
    return export_emoji(package, tmp_path_factory.mktemp("emoji") / "set", seed=1, validation_share=0.2, num_shards=3)


@pytest.fixture
def broken(tmp_path):
    return make_package(tmp_path / "broken")


def rows(folder, split):
    """Name, label and pixels of every row."""
    from datasets import Image

    data_set = load_dataset(str(folder), split=split, streaming=True).cast_column("image", Image(decode=False))
    found = []
    for row in data_set:
        image = PIL.Image.open(io.BytesIO(row["image"]["bytes"]))
        assert image.mode == "RGB"
        found.append((row["image"]["path"], row["label"], np.asarray(image)))
    return found


def bases(folder, split):
    return {name.removesuffix(".png").partition("-")[0] for name, _, _ in rows(folder, split)}


def content(folder):
    return {file.name: file.read_bytes() for file in (folder / "data").iterdir()}


def test_it_streams_with_its_splits_and_classes(folder):
    data_set = load_dataset(str(folder), streaming=True)
    assert set(data_set) == {"train", "validation"} and data_set["train"].num_shards == 3
    assert data_set["train"].features["label"].names == CATEGORIES
    counts = {split: np.bincount([r[1] for r in rows(folder, split)], minlength=3).tolist() for split in data_set}
    # of 19 groups of flags 4 are held out, of 28 of people 6; the only object is needed for training
    flags, objects, people = counts["validation"]
    assert flags in (4, 5) and objects == 0 and people in (18, 24)
    assert np.sum(list(counts.values()), axis=0).tolist() == [20, 1, 90]
    card = (folder / "README.md").read_text()
    assert "version 1.2.3" in card and "111 emoji" in card and "share of 0.2" in card
    assert f"| People & Body | {90 - people} | {people} |" in card


def test_every_picture_is_there_once_on_white(folder):
    found = {name: (label, image) for split in ("train", "validation") for name, label, image in rows(folder, split)}
    assert len(found) == 111 and "zz.png" not in found
    label, image = found["p03-1f3fc.png"]
    assert label == 2 and (image[0] == 255).all()
    number = 20 + 1 + 3 * 3 + 3
    over_white = [round(channel * 128 / 255 + 255 * 127 / 255) for channel in (2 * number, 0, 7)]
    np.testing.assert_allclose(image[16:48, 16:48].reshape(-1, 3), np.tile(over_white, (1024, 1)), atol=1)
    assert (found["o00.png"][1] == 5).all()


def test_what_looks_the_same_is_in_one_split(package, tmp_path):
    """For many seeds: skin tones with their base, and emoji that have a picture in common."""
    sides = {"f": set(), "p": set()}
    for seed in range(12):
        folder = export_emoji(package, tmp_path / str(seed), seed=seed, validation_share=0.3, num_shards=1)
        train, validation = bases(folder, "train"), bases(folder, "validation")
        assert not train & validation
        for kind, group in (("f", {"f00", "f01"}), ("p", {"p00", "p01", "p02"})):
            assert group <= train or group <= validation
            sides[kind].add(group <= train)
        pictures = {image.tobytes() for _, _, image in rows(folder, "train")}
        assert not any(image.tobytes() in pictures for _, _, image in rows(folder, "validation"))
    assert sides == {"f": {True, False}, "p": {True, False}}


def test_archive_and_folder_give_the_same_files(package, folder, tmp_path):
    with tarfile.open(tmp_path / "emoji.tgz", "w:gz") as archive:
        archive.add(package, "package")
    options = {"seed": 1, "validation_share": 0.2, "num_shards": 3}
    assert content(export_emoji(tmp_path / "emoji.tgz", tmp_path / "new" / "same", **options)) == content(folder)
    assert bases(export_emoji(package, tmp_path / "other", seed=2), "validation") != bases(folder, "validation")


def test_others_can_read_it_and_rows_are_in_random_order(folder):
    assert folder.stat().st_mode & 0o755 == 0o755
    names = [name for name, _, _ in rows(folder, "train")]
    assert len({name[0] for name in names[:20]}) > 1 and names != sorted(names)


def test_it_opens_as_a_source(folder, tmp_path):
    source = open_images(folder, split="validation", cache_dir=tmp_path)
    assert source.num_rows == len(rows(folder, "validation")) and source.id2label == dict(enumerate(CATEGORIES))


def test_a_finished_export_is_kept_and_anything_else_is_not_overwritten(package, folder, tmp_path):
    before = (folder / "README.md").stat().st_mtime_ns
    assert export_emoji(package, folder, seed=1, validation_share=0.2, num_shards=3) == folder
    assert (folder / "README.md").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="not the export of this package with seed 2"):
        export_emoji(package, folder, seed=2, validation_share=0.2, num_shards=3)
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="remove it or choose another"):
        export_emoji(package, tmp_path)


def test_an_interrupted_export_leaves_nothing(package, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        export_emoji(package, tmp_path / "emoji")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_shards": 0}, "`num_shards`.*0"),
        ({"num_shards": 1000}, "`num_shards` must be at most"),
        ({"validation_share": 0.0}, "`validation_share`.*0.0"),
        ({"validation_share": float("nan")}, "`validation_share`.*nan"),
    ],
)
def test_bad_settings_are_refused(package, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        export_emoji(package, tmp_path / "emoji", **options)
    assert list(tmp_path.iterdir()) == []


def test_incomplete_packages_are_refused(broken, tmp_path):
    with pytest.raises(ValueError, match="does not exist: get the package with `npm pack"):
        export_emoji(tmp_path / "nowhere.tgz", tmp_path / "out")
    (tmp_path / "text.tgz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"text\.tgz.*cannot be read as a \.tgz archive"):
        export_emoji(tmp_path / "text.tgz", tmp_path / "out")
    with tarfile.open(tmp_path / "whole.tgz", "w:gz") as archive:
        archive.add(broken, "package")
    whole = (tmp_path / "whole.tgz").read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.tgz.*npm pack"):
        export_emoji(tmp_path / "cut.tgz", tmp_path / "out")

    images = broken / "img" / "google" / "64"
    picture(1).resize((32, 32)).save(images / "f03.png")
    with pytest.raises(ValueError, match=r"f03\.png has 32 x 32 pixels"):
        export_emoji(broken, tmp_path / "out")
    (images / "f03.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 images .*f03\.png"):
        export_emoji(broken, tmp_path / "out")
    (broken / "emoji.json").unlink()
    with pytest.raises(ValueError, match=r"has no emoji\.json"):
        export_emoji(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
