"""Pictures: lines and points are the numbers of the records."""

import numpy as np
import pytest

from maetok_hf.study import pictures
from maetok_hf.study.summaries import make_measures
from maetok_hf.study.variants import VARIANTS
from tests.study.small import made_up_record, small_cell


@pytest.fixture(scope="module")
def records():
    shifts = {"autoencoder": 0.3, "maetok": -0.2, "maetok-finetuned": -0.1, "two-sizes-rope": 0.0}
    return [made_up_record(small_cell(name, seed), shift) for seed in (1, 0) for name, shift in shifts.items()]


@pytest.fixture(scope="module")
def compared(records):
    return [record for record in records if "samples" in record["measured"]]


def lines_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): tuple(map(list, line.get_data())) for line in axes.get_lines()}


def test_modes_are_means_over_seeds_of_all_that_have_latents_of_their_own(compared):
    left, right = pictures._modes(compared, make_measures(2)).axes
    for axes, xs, ys in [(left, [1, 2], [1.305, 1.205]), (right, [1, 2, 3, 4], [2.305, 1.805, 1.305 + 1 / 3, 1.555])]:
        lines = lines_of(axes)
        assert lines.keys() == {VARIANTS[name].title for name in ("autoencoder", "maetok")}
        assert lines["AE"] == (xs, pytest.approx(ys))
        assert lines["MAETok (masks, HOG)"] == (xs, pytest.approx(np.array(ys) - 0.5))


def test_bands_reach_from_the_smallest_to_the_largest(compared):
    left, _ = pictures._modes(compared, make_measures(2)).axes
    bands = [band.get_paths()[0].vertices[:, 1] for band in left.collections]
    assert (min(bands[0]), max(bands[0])) == (pytest.approx(1.2), pytest.approx(1.31))


def test_generation_over_the_probe_has_a_point_for_each_seed(compared):
    left, right = pictures._probe_and_distance(compared, make_measures(2)).axes
    assert right.get_yscale() == "log"
    points = {group.get_label(): np.sort(group.get_offsets(), axis=0) for group in left.collections}
    assert list(points) == [VARIANTS[name].title for name in ("autoencoder", "maetok", "maetok-finetuned")]
    expected = [[50 * value, 7 * value] for value in (0.9, 0.91)]
    np.testing.assert_allclose(points["MAETok + decoder fine-tuning"], expected)
    assert lines_of(right)["AE"] == ([1, 2, 3, 4], pytest.approx([14.05, 13.55, 13.05 + 1 / 3, 13.3]))


def test_variants_can_be_told_apart_and_look_the_same_in_every_picture():
    records = [{"identity": {"variant": name, "seed": 0}} for name in VARIANTS]
    styles = {name: tuple(style.values()) for name, _, style in pictures._present(records)}
    assert len(set(styles.values())) == len(VARIANTS)
    assert {name: tuple(style.values()) for name, _, style in pictures._present(records[5:7])}.items() < styles.items()


def test_cells_without_a_generator_are_not_drawn(records, compared, tmp_path):
    files = pictures.draw_pictures(tmp_path / "all", "cpu", records, 2)
    assert files == {"modes": "cpu-modes.png", "probe-and-distance": "cpu-probe-and-distance.png"}
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(files.values())
    assert pictures.draw_pictures(tmp_path / "none", "cpu", [r for r in records if r not in compared], 2) == {}
    assert not (tmp_path / "none").exists()
