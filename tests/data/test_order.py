from collections import Counter

import pytest
import torch

from maetok_hf.data import resolution_at
from maetok_hf.data.order import check_resolutions


def test_one_resolution_is_every_resolution():
    assert {resolution_at(0, step, (256,)) for step in range(10)} == {256}


def test_resolutions_are_equally_frequent_by_default():
    counts = Counter(resolution_at(3, step, (256, 384, 512)) for step in range(3000))
    assert counts.keys() == {256, 384, 512}
    assert all(900 < count < 1100 for count in counts.values())


def test_resolutions_follow_their_weights():
    counts = Counter(resolution_at(3, step, (256, 384, 512), (3, 0, 1)) for step in range(2000))
    assert counts.keys() == {256, 512}
    assert 1420 < counts[256] < 1580
    assert {resolution_at(0, step, (256, 512), (0, 0.5)) for step in range(50)} == {512}
    assert {resolution_at(0, step, (256, 512), (0.5, 0)) for step in range(50)} == {256}


def test_the_resolution_depends_on_seed_and_step_only():
    drawn = [resolution_at(0, step, (8, 16)) for step in range(64)]
    torch.manual_seed(1)
    assert drawn == [resolution_at(0, step, (8, 16)) for step in range(64)]
    assert drawn != [resolution_at(1, step, (8, 16)) for step in range(64)]
    assert drawn == [resolution_at(0, step, (8, 16), (2, 2)) for step in range(64)]


@pytest.mark.parametrize("value", [0, 8.0, True, (), (8, 8), (8, 0), [8, "16"], "8", None])
def test_bad_resolutions_are_named(value):
    with pytest.raises(ValueError, match="`resolution` must be"):
        check_resolutions(value, None)


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1, -1), (0, 0), (1, float("nan")), (1, float("inf"))])
def test_bad_weights_are_named(weights):
    with pytest.raises(ValueError, match="`resolution_weights` must be one number for each of the 2"):
        check_resolutions((8, 16), weights)
