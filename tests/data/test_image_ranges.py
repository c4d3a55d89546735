import itertools

import pytest
import torch

from maetok_hf.data import COUNT_NAMES, ImageRanges


RANGES = [range(20, 31), range(3, 6), range(60, 61)]


def images_of(source, **settings):
    return ImageRanges(source, **{"resolution": 8, "batch_size": 4, "ranges": RANGES} | settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_of_every_range_comes_once_in_order(make_source, toy, kind, num_workers):
    batches = list(images_of(make_source(kind), resolution=9).dataloader(num_workers))
    assert [batch["indices"].tolist() for batch in batches] == [
        [20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30], [3, 4, 5], [60],
    ]  # fmt: skip
    assert [batch["range"] for batch in batches] == [0, 0, 0, 1, 2]
    for batch in batches:
        for image, label, index in zip(batch["images"], batch["class_labels"], batch["indices"], strict=True):
            assert torch.equal(image, torch.from_numpy(toy.pixels(int(index))[:, 1:10].copy()).permute(2, 0, 1))
            assert label == toy.labels(61)[index]


def test_batches_of_a_range_do_not_depend_on_the_other_ranges(make_source):
    source = make_source()
    alone = list(images_of(source, ranges=RANGES[1:2]))
    among = [batch for batch in images_of(source) if batch["range"] == 1]
    for one, other in itertools.zip_longest(alone, among):
        assert torch.equal(one["images"], other["images"]) and torch.equal(one["indices"], other["indices"])


def test_rows_without_a_usable_image_are_left_out_and_named(make_source, toy):
    images = [b"broken" if index in (1, 4, 5) else toy.png(index) for index in range(7)]
    source = make_source(images=images, classes=[0] * 7)
    batches = list(images_of(source, batch_size=2, ranges=[range(7)]))
    assert [batch["indices"].tolist() for batch in batches] == [[0], [2, 3], [], [6]]
    assert [batch["left_out"] for batch in batches] == [[1], [], [4, 5], []]
    assert batches[2]["images"].shape == (0, 3, 8, 8)
    corrupt = COUNT_NAMES.index("corrupt")
    assert [batch["counts"][corrupt].item() for batch in batches] == [1, 0, 2, 0]


@pytest.mark.parametrize("ranges", [[range(-1, 3)], [range(3, 3)], [range(60, 62)]])
def test_ranges_outside_of_the_data_set_are_refused(make_source, ranges):
    with pytest.raises(ValueError, match="must lie in the 61 rows"):
        images_of(make_source(), ranges=ranges)
