"""Presets: where generators are measured, what of a budget is part of a cell's identity, and which data they have."""

import dataclasses

import pytest

from maetok_hf.study import presets
from maetok_hf.study.presets import PRESETS
from tests.study.small import BUDGET


def test_generators_are_measured_after_quarters_before_the_end():
    for steps, expected in [(2500, [625, 1250, 1875]), (4, [1, 2, 3]), (3, [1, 2]), (1, []), (30, [7, 14, 21])]:
        assert dataclasses.replace(BUDGET, generator_steps=steps).curve_steps() == expected


def test_measures_are_everything_that_no_command_says():
    for preset in PRESETS.values():
        trained = {"tokenizer_steps", "finetuning_steps", "generator_steps", "classifier_epochs"}
        assert preset.budget.measures().keys() == {f.name for f in dataclasses.fields(preset.budget)} - trained
        assert preset.budget.mixture_size in preset.budget.mixture_sizes


def test_only_the_gpu_preset_has_a_package_and_it_needs_one(tmp_path):
    for preset, package, message in [
        (PRESETS["cpu"], "emoji.tgz", "the preset 'cpu' has its own data"),
        (PRESETS["gpu"], None, "the preset 'gpu' needs what `npm pack emoji-datasource-google` fetches"),
    ]:
        with pytest.raises(ValueError, match=message):
            preset.export(tmp_path / "data", package)
    assert not any(tmp_path.iterdir())


def test_the_digest_of_the_data_is_that_of_their_card(tmp_path, monkeypatch):
    def export(folder, seed):
        assert seed == 0
        folder.mkdir()
        (folder / "README.md").write_text(next(cards))

    monkeypatch.setattr(presets, "export_mnist", export)
    cards = iter(["digits", "digits", "other digits"])
    digests = [PRESETS["cpu"].export(tmp_path / str(number) / "data", None) for number in range(3)]
    assert digests[0] == digests[1] != digests[2]
