"""Which images are analysed, and what is refused before any of them is encoded."""

import numpy as np
import pytest

from maetok_hf.analysis import subjects
from maetok_hf.analysis.chosen_images import ImageData, draw_rows
from maetok_hf.analysis.subjects import open_subjects
from tests.analysis.conftest import CLASSES, NUM_HELD_OUT, NUM_TRAIN, write_images


def test_a_share_is_held_out_that_depends_on_the_seed_alone(make_options):
    options = make_options(held_out_split=None, held_out_share=0.2)
    rows = draw_rows(options, 100)
    assert len(rows["held_out"]) == 20
    assert sorted([*rows["train"], *rows["held_out"]]) == list(range(100))
    assert all((np.diff(side) > 0).all() for side in rows.values())
    # fewer training images are some of the same, and the held-out ones stay
    fewer = draw_rows(make_options(held_out_split=None, held_out_share=0.2, num_train_images=30), 100)
    assert set(fewer["train"]) < set(rows["train"]) and (fewer["held_out"] == rows["held_out"]).all()
    other = draw_rows(make_options(held_out_split=None, held_out_share=0.2, seed=1), 100)
    assert set(other["held_out"]) != set(rows["held_out"])


def test_images_of_two_splits_are_drawn_from_each(make_options):
    rows = draw_rows(make_options(num_train_images=7, num_held_out_images=5), 20, 6)
    assert len(set(rows["train"])) == 7 and max(rows["train"]) < 20
    assert len(set(rows["held_out"])) == 5 and max(rows["held_out"]) < 6
    whole = draw_rows(make_options(), 20, 6)
    assert (whole["train"] == np.arange(20)).all() and (whole["held_out"] == np.arange(6)).all()


def test_classes_are_known_before_the_images_are_read(make_options):
    data = ImageData(make_options(num_train_images=10))
    assert data.known_labels("train").tolist() == (data.rows["train"] // NUM_TRAIN).tolist()
    assert data.known_labels("held_out").tolist() == np.repeat(range(3), NUM_HELD_OUT).tolist()


def write_parquet(folder, names):
    """20 images of two splits, all of the first class, or without classes."""
    from datasets import ClassLabel, Dataset, Features, Image

    for split in ("train", "test"):
        write_images(folder / "files", split, "cat", range(20), 0)
        paths = sorted((folder / "files" / split / "cat").iterdir())
        table = {"image": [{"bytes": path.read_bytes(), "path": None} for path in paths]}
        features = {"image": Image()}
        if names is not None:
            table["label"], features["label"] = [0] * len(paths), ClassLabel(names=names)
        (folder / "data").mkdir(exist_ok=True)
        Dataset.from_dict(table, features=Features(features)).to_parquet(folder / "data" / f"{split}.parquet")
    return folder / "data"


def no_classes(folder):
    return write_parquet(folder, None)


def one_class(folder):
    return write_parquet(folder, ["cat"])


def one_class_of_two(folder):
    return write_parquet(folder, ["cat", "dog"])


def one_class_in_training(folder):
    write_images(folder, "train", "cat", range(40), 0)
    write_images(folder, "train", "dog", range(1), 0)
    write_images(folder, "test", "cat", range(9), 0)
    write_images(folder, "test", "dog", range(9), 0)
    return folder


@pytest.mark.parametrize(
    ("images", "change", "message"),
    [
        (no_classes, {}, "no class labels: name their column by `label_column`"),
        (one_class, {}, "a single class"),
        (one_class_of_two, {}, "All training images are of a single class"),
        (one_class_in_training, {"num_train_images": 4}, "All training images are of a single class"),
        (None, {"mixture_sizes": [2, 49]}, "up to 49 components, but there are 48 training images"),
        (None, {"parts": ["umap"], "umap_num_neighbors": 48}, "`umap_num_neighbors` is 48"),
        (None, {"num_train_images": 49}, "`num_train_images` is 49, but there are only 48"),
        (None, {"num_held_out_images": 19}, "`num_held_out_images` is 19, but there are only 18"),
        (None, {"held_out_split": None, "num_held_out_images": 47}, "at least 2 must remain"),
        (None, {"held_out_split": "train"}, "`held_out_split` is `split`"),
        (None, {"dataset": None}, "`dataset` is missing"),
        (None, {"names": ["a", "b"], "tokenizer": ["nowhere/at/all/", "x"]}, "neither a folder nor a name on the Hub"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_encoding(
    make_options, tmp_path, monkeypatch, images, change, message
):
    monkeypatch.setattr(subjects, "ViewEncoder", None)
    if images is not None:
        change = change | {"dataset": str(images(tmp_path / "other"))}
    with pytest.raises(ValueError, match=message):
        open_subjects(make_options(**change), "cpu")


def test_images_without_classes_will_do_for_mixtures(make_options, tmp_path):
    options = make_options(dataset=str(no_classes(tmp_path)), parts=["statistics", "mixtures"])
    subject, _ = open_subjects(options, "cpu").values()
    labels = [block.labels for block in subject.blocks("train", 0)]
    assert [len(part) for part in labels] == [20] and (labels[0] == -1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": []}, "`tokenizer` must name at least one"),
        ({"names": ["one"]}, "`names` must be one for each of 2"),
        ({"mixture_sizes": [2, 2]}, "none twice"),
        ({"mixture_sizes": [0]}, "`mixture_sizes` must be at least 1"),
        ({"mixture_variance": 1.0}, r"`mixture_variance` must lie in \(0, 1\)"),
        ({"held_out_share": 0.5}, "no effect with `held_out_split`"),
        ({"probe_l2": 0.0}, "`probe_l2` must be positive"),
        ({"num_dimensions": 3, "same_dimension": False}, "remove `same_dimension`"),
        ({"umap_num_neighbors": 1}, "`umap_num_neighbors` must be at least 2"),
    ],
)
def test_options_out_of_range_are_refused(make_options, change, message):
    with pytest.raises(ValueError, match=message):
        make_options(**change)


def test_corrupt_images_are_left_out_and_counted(make_options, tmp_path):
    folder = tmp_path / "other"
    for shade, name in enumerate(CLASSES):
        write_images(folder, "train", name, range(4), shade)
        write_images(folder, "test", name, range(4, 6), shade)
    (folder / "train" / "dog" / "001.png").write_bytes(b"broken")
    subject, _ = open_subjects(make_options(dataset=str(folder)), "cpu").values()
    indices = [int(index) for block in subject.blocks("train", 0) for index in block.indices]
    assert indices == [row for row in range(12) if row != 5]
