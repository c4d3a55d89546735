"""Classes of a set: what the words of a command line name, and which class an image gets."""

import pytest
import torch

from maetok_hf.sampling import describe_counts, draw_labels, select_classes
from maetok_hf.seeding import keyed_generator
from tests.pipelines.helpers import tiny_pipeline


NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "great white shark, 5", 3: "4"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(id2label=NAMES)


@pytest.mark.parametrize(
    ("words", "classes"),
    [
        (["all"], list(range(10))),
        (["7"], [7]),
        (["tench,goldfish"], [0, 1]),
        (["goldfish", "tench, Tinca tinca", "great white shark"], [1, 0, 2]),
        (["9, 1,Tinca tinca", "6"], [9, 1, 0, 6]),
    ],
)
def test_words_are_indices_names_and_lists_of_them_in_order(pipe, words, classes):
    assert select_classes(words, pipe) == classes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "names no class"),
        (["all", "7"], "'all' or name classes"),
        (["10"], r"must lie in \[0, 9\] for this model, got \[10\]"),
        (["-1"], r"got \[-1\]"),
        (["goldfisch"], "did you mean 'goldfish'"),
        (["tench", "Tinca tinca"], r"names the classes \[0\] more than once"),
        (["4"], r"'4' may mean class 4 or the class of that name, \[3\]"),
        (["goldfish,"], "'' is not a class name"),
    ],
)
def test_words_that_name_no_class_or_two_are_refused(pipe, words, message):
    with pytest.raises(ValueError, match=message):
        select_classes(words, pipe)


def test_number_that_is_the_name_of_its_own_class_is_no_ambiguity():
    assert select_classes(["7"], tiny_pipeline(id2label={7: "7"})) == [7]


def test_balanced_labels_take_classes_in_turn_so_that_the_first_have_one_more():
    assert draw_labels(8, [4, 2, 9], "balanced", 0).tolist() == [4, 2, 9, 4, 2, 9, 4, 2]
    assert describe_counts(8, 3, "balanced") == "8 images of 3 classes, 2 each, and one more of the first 2"
    assert describe_counts(9, 3, "balanced") == "9 images of 3 classes, 3 each"


def test_random_label_of_an_image_is_a_function_of_seed_and_index():
    classes = [4, 2, 9]
    labels = draw_labels(3000, classes, "random", 5)
    assert torch.equal(draw_labels(40, classes, "random", 5), labels[:40])
    draw = torch.randint(3, (1,), generator=keyed_generator(5, "sampling label", 17)).item()
    assert labels[17] == classes[draw]
    assert not torch.equal(draw_labels(3000, classes, "random", 6), labels)
    # a binomial count has a standard deviation of 26
    assert all(abs((labels == index).sum() - 1000) < 130 for index in classes)
