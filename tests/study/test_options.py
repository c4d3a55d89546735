"""What the study is asked for: which tokenizers, how long, and what is refused."""

import dataclasses

import pytest

from maetok_hf.study.options import StudyOptions
from maetok_hf.study.presets import PRESETS
from maetok_hf.study.variants import VARIANTS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": ["vae"]}, r"`variants` must name different ones of autoencoder, .*, got vae"),
        ({"variants": ["maetok", "maetok"]}, "`variants` must name different ones"),
        ({"seeds": [1, 1]}, "`seeds` must name different ones, got 1, 1"),
        ({"seeds": []}, "`seeds` must be numbers that are not negative"),
        ({"seeds": [-1]}, r"`seeds` must be numbers that are not negative, got \[-1\]"),
        ({"full": True, "variants": ["maetok"]}, "`full` has no effect with `variants`"),
        ({"dry_run": True, "report_only": True}, "`dry_run` writes nothing and `report_only` writes the document"),
        ({"num_threads": 0}, "`num_threads` must be at least 1, got 0"),
        ({"max_train_steps": 0, "results_dir": "x"}, "`max_train_steps` must be at least 1, got 0"),
        ({"max_train_steps": 4}, "`max_train_steps` needs another `results_dir`"),
        ({"max_train_steps": 4, "results_dir": "./docs/"}, "`max_train_steps` needs another `results_dir`"),
        ({"variants": ["maetok-finetuned"]}, "`variants` fine-tunes 'maetok', which must be among them"),
    ],
)
def test_what_cannot_be_studied_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        StudyOptions(**values)


def test_without_more_words_the_core_is_studied_and_with_full_everything():
    core = ["autoencoder", "kl-vae", "maetok", "maetok-finetuned"]
    assert StudyOptions().chosen_variants() == core
    assert StudyOptions(full=True).chosen_variants() == list(VARIANTS)
    assert StudyOptions(variants=["targets", "kl-vae"]).chosen_variants() == ["targets", "kl-vae"]
    assert StudyOptions().seeds == [0, 1, 2]


@pytest.mark.parametrize("name", PRESETS)
def test_cutting_short_leaves_no_budget_longer_and_every_training_at_most_that_long(name):
    whole = StudyOptions(preset=name).chosen_preset()
    assert whole is PRESETS[name]
    short = StudyOptions(preset=name, max_train_steps=6, results_dir="x").chosen_preset()
    assert dataclasses.replace(short, budget=whole.budget) == whole
    before, after = dataclasses.asdict(whole.budget), dataclasses.asdict(short.budget)
    assert {setting: value for setting, value in after.items() if setting.endswith("_steps")} == {
        "tokenizer_steps": 6,
        "finetuning_steps": 6,
        "generator_steps": 6,
        "num_inference_steps": 6,
    }
    for setting in ("classifier_epochs", "num_samples", "num_curve_samples", "loss_draws", "mixture_size"):
        assert after[setting] < before[setting]
    assert len(after["mixture_seeds"]) == 1 and max(after["mixture_sizes"]) == after["mixture_size"]


def test_steps_that_are_fewer_than_the_limit_stay():
    budget = StudyOptions(max_train_steps=1000, results_dir="x").chosen_preset().budget
    assert (budget.tokenizer_steps, budget.finetuning_steps, budget.generator_steps) == (1000, 500, 1000)
    assert budget.num_inference_steps == 50
