"""Means, intervals and verdicts: those of scipy."""

import math

import pytest
import scipy.stats

from maetok_hf.study.summaries import (
    Claim,
    Interval,
    Measure,
    difference_interval,
    interval,
    make_measures,
    values_of,
    verdict,
)
from tests.study.small import made_up_record, small_cell


GFD = Measure("gfd", "gFD", "samples", ("distance",), -1, 2)
PROBE = Measure("probe", "probe", "latents", ("accuracy",), 1, 1, 100.0)


def records(**values):
    """Records by variant, one of each seed, with `samples.distance` and `latents.accuracy`."""
    return [
        {
            "identity": {"variant": name.replace("_", "-"), "seed": seed},
            "measured": {"samples": {"distance": value}, "latents": {"accuracy": value}},
        }
        for name, numbers in values.items()
        for seed, value in enumerate(numbers)
    ]


@pytest.mark.parametrize("values", [[1.0, 2.0], [3.1, 2.9, 3.3], [0.1, 7.0, -3.0, 2.5, 2.5]])
def test_the_interval_of_a_mean_is_students(values):
    found = interval(values)
    low, high = scipy.stats.t.interval(
        0.95, len(values) - 1, loc=sum(values) / len(values), scale=scipy.stats.sem(values)
    )
    assert found.mean - found.half == pytest.approx(low, rel=1e-9)
    assert found.mean + found.half == pytest.approx(high, rel=1e-9)
    assert found.count == len(values)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1.0, 1.2, 0.9], [2.0, 3.5, 2.2]), ([5.0, 5.1], [4.0, 4.9, 4.4, 4.2]), ([1.0, 2.0, 3.0], [7.0, 7.0, 7.0])],
)
@pytest.mark.filterwarnings("ignore:Precision loss:RuntimeWarning")
def test_the_interval_of_a_difference_is_welchs(first, second):
    found = difference_interval(first, second)
    expected = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval()
    assert found.mean - found.half == pytest.approx(expected.low, rel=1e-9)
    assert found.mean + found.half == pytest.approx(expected.high, rel=1e-9)
    assert found.count == min(len(first), len(second))
    assert difference_interval(second, first).mean == -found.mean


def test_one_seed_has_no_width_and_none_no_mean():
    assert interval([2.0]) == Interval(2.0, None, 1)
    assert difference_interval([2.0], [1.0, 3.0, 5.0]) == Interval(-1.0, None, 1)
    with pytest.raises(ValueError, match="`values` must not be empty"):
        interval([])


def test_numbers_that_do_not_vary_have_a_width_of_zero():
    assert interval([2.0, 2.0, 2.0]) == Interval(2.0, 0.0, 3)
    assert difference_interval([2.0, 2.0], [1.5, 1.5]) == Interval(0.5, 0.0, 2)


def test_intervals_are_written_with_their_digits():
    assert interval([1.0, 2.0, 3.0]).text(2) == "2.00 ± 2.48"
    assert Interval(1.25, None, 1).text(1) == "1.2" and Interval(1.25, 0.0, 3).text(3) == "1.250 ± 0.000"


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], "yes"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "no"),
        ([1.0, 2.0, 3.0], [1.5, 2.5, 3.5], "not resolved"),
        ([1.0], [9.0], "not resolved"),
        ([1.0, 1.0], [1.0, 1.0], "not resolved"),
        ([1.0, 1.0], [1.001, 1.001], "yes"),
    ],
)
def test_an_ordering_appears_if_the_interval_leaves_zero_out(better, worse, expected):
    claim = Claim("maetok", "autoencoder", "gfd", "")
    word, difference = verdict(records(maetok=better, autoencoder=worse), claim, GFD)
    assert word == expected
    assert difference == difference_interval(better, worse)
    # of a measure of which more is better it is the other way round
    opposite = {"yes": "no", "no": "yes"}.get(expected, expected)
    assert verdict(records(maetok=better, autoencoder=worse), claim, PROBE)[0] == opposite


def test_a_tokenizer_and_its_fine_tuning_are_compared_seed_by_seed():
    better, worse = [1.0, 5.0, 9.0], [1.5, 5.6, 9.4]
    found = records(maetok_finetuned=better, maetok=[*worse, 100.0])
    word, difference = verdict(found, Claim("maetok-finetuned", "maetok", "gfd", ""), GFD)
    expected = scipy.stats.ttest_rel(better, worse).confidence_interval()
    assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx(tuple(expected))
    assert word == "yes" and difference_interval(better, worse).half > 5, "which no independent samples would resolve"
    other_seeds = [record for record in found if record["identity"]["seed"] != 3 or "fine" in str(record["identity"])]
    assert verdict(other_seeds, Claim("maetok-finetuned", "maetok", "gfd", ""), GFD) == (word, difference)
    assert verdict(found[:3], Claim("maetok-finetuned", "maetok", "gfd", ""), GFD) is None


def test_an_ordering_without_numbers_is_left_out():
    claim = Claim("maetok", "autoencoder", "gfd", "")
    assert verdict(records(maetok=[1.0, 2.0]), claim, GFD) is None
    found = records(maetok=[1.0, 2.0], autoencoder=[1.0, 2.0])
    del found[2]["measured"]["samples"], found[3]["measured"]["samples"]
    assert verdict(found, claim, GFD) is None and verdict(found, claim, PROBE) is not None


def test_values_are_by_seed_and_skip_what_is_missing():
    found = records(maetok=[1.0, 2.0, 3.0], kl_vae=[7.0])
    del found[1]["measured"]["samples"]
    assert values_of(found[::-1], "maetok", GFD) == [1.0, 3.0]
    assert values_of(found, "maetok", PROBE) == [100.0, 200.0, 300.0]
    assert values_of(found, "kl-vae", GFD) == [7.0] and values_of(found, "targets", GFD) == []


def test_a_measure_may_be_divided_by_another_of_the_same_cell():
    measured = {"generator": {"loss": 0.9}, "latents": {"gaussian_loss": 1.5}}
    ratio = make_measures(50)["ratio"]
    assert ratio.of({"measured": measured}) == pytest.approx(0.6)
    assert ratio.of({"measured": {"latents": {"gaussian_loss": 1.5}}}) is None
    assert Measure("x", "", "latents", ("gaussian_loss",), 1, 1, 10.0).of({"measured": measured}) == 15.0


def test_every_measure_is_found_in_a_record():
    measures = make_measures(2)
    whole = [made_up_record(small_cell(name)) for name in ("maetok", "two-sizes-rope")]
    for name, measure in measures.items():
        values = [measure.of(record) for record in whole]
        assert any(value is not None and math.isfinite(value) for value in values), name
        assert measure.name == name and measure.better in (-1, 1)
    assert "GMM NLL, 2 components" in measures["nll"].title
    one, two = (make_measures(size)["nll"].of(whole[0]) for size in (1, 2))
    assert one != two
