"""Images in memory, and classes of generated images in the proportions of the real ones."""

import pytest
import torch

from maetok_hf.study.images import load_split, proportional_labels
from tests.study.small import SIZE, coloured_images, write_images


@pytest.mark.parametrize(
    "counts",
    [
        [450] * 10,
        [1, 2, 3],
        [5, 0, 3],
        [7],
        # the class that lacks most, always taken first, would leave others behind by 1.35 images
        [292, 3, 12, 6, 12, 26, 3, 3, 292, 292, 12, 292, 39],
        [10_000, *[1] * 20],
    ],
    ids=len,
)
def test_every_beginning_has_each_class_in_its_share_to_within_one_image(counts):
    total, given = sum(counts), [0] * len(counts)
    labels = proportional_labels(counts, total)
    for number, label in enumerate(labels, start=1):
        given[label] += 1
        if number < 1500:
            assert all(abs(total * done - number * count) < total for done, count in zip(given, counts, strict=True))
    assert given == counts
    assert proportional_labels(counts, 5) == (labels * 5)[:5], "a shorter list is the beginning of a longer one"


def test_equally_many_classes_take_turns():
    assert proportional_labels([450] * 4, 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert proportional_labels([3, 1], 0) == []


def test_a_split_is_all_its_images_in_order(tmp_path):
    folder = write_images(tmp_path / "data", {"train": 11, "test": 4})
    for number, (split, count) in enumerate([("train", 11), ("test", 4)]):
        found, (images, labels) = load_split(folder, split, SIZE), coloured_images(count, seed=number)
        assert found.images.dtype == torch.uint8 and torch.equal(found.images, images)
        assert torch.equal(found.labels, labels) and found.num_classes == 3 and len(found) == count
    assert load_split(folder, "train", SIZE).counts == [4, 4, 3]
    assert load_split(folder, "test", 2 * SIZE).images.shape == (4, 3, 2 * SIZE, 2 * SIZE)


def test_what_cannot_be_studied_is_refused(tmp_path):
    without = write_images(tmp_path / "without", {"train": 4}, with_classes=False)
    with pytest.raises(ValueError, match="says no number of classes: give it a `ClassLabel` column"):
        load_split(without, "train", SIZE)
    broken = write_images(tmp_path / "broken", {"train": 4}, broken_row=2)
    with pytest.raises(ValueError, match="Row 2 of split 'train' in .* cannot be read"):
        load_split(broken, "train", SIZE)
