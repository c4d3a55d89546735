"""The picture of how speed scales."""

import benchmarks.__main__ as suite
from benchmarks.suite.cases import Case
from benchmarks.suite.curves import draw, points_of
from tests.benchmarks.test_suite import failing, record_of


CASES = [Case("batch", f"batch {n}", failing, point=n, curve="a model") for n in (4, 1, 2)] + [
    Case("other", "not on a curve", failing)
]


def record(n, **settings):
    return record_of(f"batch {n}", 1.0, group="batch") | settings


def test_points_are_those_measured_of_the_curve_from_left_to_right():
    records = [
        record(4),
        record(1),
        record(2, failed="no memory"),
        record(2, dtype="bfloat16"),
        record_of("else", 1.0),
    ]
    assert points_of(records, CASES, "batch", "cpu", "float32") == [(1, record(1)), (4, record(4))]
    assert points_of(records, CASES, "batch", "cuda", "float32") == []


def test_the_same_report_gives_the_same_picture_and_a_single_point_none(tmp_path):
    report = {"records": [record(n) for n in (1, 4)]}
    for name in ("one.png", "two.png"):
        assert draw(report, CASES, "cpu", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert not draw({"records": [record(1)]}, CASES, "cpu", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_curves_of_the_suite_reach_as_far_as_is_said():
    points = {}
    for case in suite.CASES:
        if case.point is not None:
            points.setdefault(case.group, []).append(case.point)
    ends = {group: (min(values), max(values)) for group, values in points.items()}
    assert ends == {"tokens": (32, 1024), "batch": (1, 256), "image size": (256, 1024)}
