"""A blind comparison: draws follow from its seed, votes count for the right side, and the files say it all."""

import csv
import io
import json

import pytest

from maetok_hf.page.abilities import NO_CLASS
from maetok_hf.page.comparison import (
    LEFT,
    RANDOM_CLASS,
    RIGHT,
    TIE,
    Comparison,
    check_comparable,
    common_classes,
    common_schemes,
    common_solvers,
)
from maetok_hf.page.generation import MAX_SEED, GenerationSettings
from tests.pipelines.helpers import tiny_pipeline


CLASSES = {**{index: f"digit {index}" for index in range(10)}, NO_CLASS: "no class"}
START = Comparison(names=("a", "b"), revisions=(None, "v1"))


def asked(**values):
    return GenerationSettings(**({"class_index": RANDOM_CLASS, "seed": 3} | values))


def votes(count, vote=LEFT, **values):
    comparison = START
    for _ in range(count):
        comparison = comparison.next_pair(asked(**values), CLASSES).vote(vote)
    return comparison


def test_everything_drawn_follows_from_the_seed():
    first, again, other = votes(60), votes(60), votes(60, seed=4)
    assert first == again
    sides = [pair.first_is_left for pair in first.pairs]
    classes = [pair.settings.class_index for pair in first.pairs]
    assert 15 < sum(sides) < 45 and sides != [pair.first_is_left for pair in other.pairs]
    assert set(classes) == set(range(10))  # the null class is no class to compare by
    assert [pair.settings.seed for pair in first.pairs] == [3 + number for number in range(60)]
    assert all(pair.class_name == f"digit {pair.settings.class_index}" for pair in first.pairs)


def test_the_class_may_be_chosen():
    pair = START.next_pair(asked(class_index=NO_CLASS, num_images=4), CLASSES).pairs[0]
    assert pair.settings.class_index == NO_CLASS and pair.settings.num_images == 1
    with pytest.raises(ValueError, match="no class 12 in common"):
        START.next_pair(asked(class_index=12), CLASSES)
    with pytest.raises(ValueError, match="The seed of this pair would be above"):
        votes(1, seed=MAX_SEED).next_pair(asked(seed=MAX_SEED), CLASSES)


@pytest.mark.parametrize("vote", [LEFT, TIE, RIGHT])
def test_a_vote_counts_for_the_pipeline_on_that_side(vote):
    comparison = votes(40, vote)
    left = sum(pair.first_is_left for pair in comparison.pairs)
    expected = {LEFT: (left, 0, 40 - left), TIE: (0, 40, 0), RIGHT: (40 - left, 0, left)}[vote]
    assert tuple(comparison.tally.values()) == expected and list(comparison.tally) == ["wins", "ties", "losses"]


def test_a_pair_gets_one_vote():
    comparison = START.next_pair(asked(), CLASSES)
    assert comparison.waits_for_vote and sum(comparison.tally.values()) == 0
    voted = comparison.vote(TIE)
    assert not voted.waits_for_vote and comparison.waits_for_vote  # nothing was changed in place
    with pytest.raises(ValueError, match="has a vote already"):
        voted.vote(LEFT)
    with pytest.raises(ValueError, match="has a vote already"):
        START.vote(LEFT)
    with pytest.raises(ValueError, match="must be one of left, tie, right"):
        comparison.vote("both")


def test_a_pair_without_a_vote_cannot_be_exchanged_for_a_better_one():
    comparison = votes(2).next_pair(asked(), CLASSES)
    for other in (asked(), asked(seed=4), asked(class_index=5)):
        with pytest.raises(ValueError, match="This pair has no vote yet"):
            comparison.next_pair(other, CLASSES)


def test_files_hold_every_vote_with_what_it_was_about():
    settings = {"scheme": "cfg", "scale": 1.5, "interval": (0.0, 0.75), "num_inference_steps": 20}
    comparison = votes(3, RIGHT, **settings).next_pair(asked(), CLASSES)
    content = json.loads(json.dumps(comparison.to_dict()))
    assert content["second"] == {"pretrained_model_name_or_path": "b", "revision": "v1"}
    assert content["tally_of_first"] == comparison.tally and len(content["pairs"]) == 3
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert len(rows) == 3 and list(rows[0]) == list(content["pairs"][0])
    for row, pair in zip(rows, comparison.pairs, strict=False):
        assert {row["left"], row["right"]} == {"a", "b"}
        assert (row["left"] == "a") == pair.first_is_left == (row["left_is_first"] == "True")
        assert row["vote"] == "right" and row["first"] == ("loss" if pair.first_is_left else "win")
        assert (row["guidance"], row["guidance_scale"], row["guidance_high"]) == ("cfg", "1.5", "0.75")
        assert row["num_inference_steps"] == "20" and int(row["seed"]) == 3 + int(row["pair"])
    assert START.to_csv() == ""


def test_two_of_one_name_are_told_apart():
    assert START.labels == ("a", "b @ v1")
    assert Comparison(names=("a", "a")).labels == ("a (first)", "a (second)")


def test_only_pipelines_of_the_same_classes_are_compared():
    plain, named = tiny_pipeline(), tiny_pipeline(id2label={0: "tench"})
    check_comparable(plain, named)
    with pytest.raises(ValueError, match="10 and 3 classes"):
        check_comparable(plain, tiny_pipeline(transformer={"num_classes": 3}))
    with pytest.raises(ValueError, match="class 0 is 'tench' in one pipeline and 'shark' in the other"):
        check_comparable(named, tiny_pipeline(id2label={0: "shark"}))
    assert common_classes(plain, named)[0] == common_classes(named, plain)[0] == "tench"


def test_what_both_can_do_is_offered():
    first = tiny_pipeline("sde", guidance_transformer={})
    second = tiny_pipeline("euler", transformer={"class_dropout_prob": 0.0})
    assert common_schemes(first, second) == ["none"]
    assert NO_CLASS in common_classes(first, first) and NO_CLASS not in common_classes(first, second)
    solvers = common_solvers(first, second)
    assert solvers["own"] == "each pipeline's own" and set(solvers) == {"own", "heun", "unipc", "dpm-solver++"}
