"""Cells: commands that the scripts accept, an identity that tells cells apart, and fair comparisons."""

import dataclasses
import functools
import itertools
import json
from pathlib import Path

import pytest

from maetok_hf import AutoencoderMAE
from maetok_hf.study import cells as module
from maetok_hf.study.cells import Cell, make_cells
from maetok_hf.study.options import StudyOptions
from maetok_hf.study.presets import CPU, PRESETS
from maetok_hf.study.summaries import CLAIMS, make_measures
from maetok_hf.study.variants import VARIANTS
from tests.study.small import RECIPES


CORE = StudyOptions().chosen_variants()


def cell_of(name: str, preset=CPU, seed: int = 0) -> Cell:
    return Cell(preset, VARIANTS[name], seed, RECIPES)


def changed(cell: Cell, **budget) -> Cell:
    preset = dataclasses.replace(cell.preset, budget=dataclasses.replace(cell.preset.budget, **budget))
    return dataclasses.replace(cell, preset=preset)


def recipe_of(name: str, preset=CPU, stage: int = 0) -> dict:
    return _recipe_of(name, preset.name, stage)


@functools.cache
def _recipe_of(name: str, preset: str, stage: int) -> dict:
    cell = cell_of(name, PRESETS[preset])
    return cell.recipe_of(cell.stages(Path("root"))[stage])


def flag(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
@pytest.mark.parametrize("name", VARIANTS)
def test_commands_are_accepted_and_train_what_the_variant_says(name, preset):
    cell, budget = cell_of(name, preset, seed=2), preset.budget
    variant, stages = cell.variant, {stage.name: stage for stage in cell.stages(Path("root"))}
    own_generator = variant.has_generator and variant.base is None
    assert list(stages) == ["tokenizer", "latents", "generator"][: 3 if own_generator else 1]
    recipe = cell.recipe_of(stages["tokenizer"])
    assert recipe["resolution"] == preset.resolution
    if variant.base is None:
        assert recipe["stage"] == "mask_modelling" and recipe["max_train_steps"] == budget.tokenizer_steps
        assert (recipe["mask_ratio_max"] > 0) == variant.masked
        assert recipe["auxiliary_targets"] == (["hog"] if variant.targets else [])
        assert (recipe["model"]["num_latent_tokens"] > 0) == variant.learnable_tokens
        assert recipe["model"].get("gaussian_posterior", False) == variant.posterior
        sizes = [preset.resolution, preset.second_resolution] if variant.positions else []
        assert recipe["mixed_resolutions"] == sizes
        assert recipe["model"]["position_embedding"] == (variant.positions or "absolute")
    else:
        assert recipe["stage"] == "decoder_finetuning" and recipe["max_train_steps"] == budget.finetuning_steps
    if own_generator:
        assert cell.recipe_of(stages["generator"])["max_train_steps"] == budget.generator_steps
        assert cell.recipe_of(stages["latents"]) is None
    for stage in stages.values():
        folder = Path("root") / preset.name / f"{name}-seed2" / stage.name
        assert flag(stage.words, "--output_dir") == str(folder)
        if stage.name != "latents":
            assert flag(stage.words, "--seed") == "2"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_tokenizers_differ_in_nothing_but_what_their_variants_say(preset):
    plain = recipe_of("autoencoder", preset)
    own = {"mask_ratio_min", "mask_ratio_max", "auxiliary_targets", "kl_weight", "model", "mixed_resolutions"}
    # without masks or targets the settings of these have no effect and are the defaults
    own |= {name for name in plain if name.startswith(("mask_ratio_", "auxiliary_", "hog_"))}
    for name, variant in VARIANTS.items():
        if variant.base is None:
            recipe = recipe_of(name, preset)
            assert {key for key in plain if recipe[key] != plain[key]} <= own
            assert recipe["kl_weight"] == (1e-6 if variant.posterior else plain["kl_weight"])


def test_generators_are_trained_alike():
    for preset in PRESETS.values():
        names = [name for name, variant in VARIANTS.items() if variant.has_generator and variant.base is None]
        recipes = [recipe_of(name, preset, stage=2) for name in names]
        assert len(recipes) == 10 and all(recipe == recipes[0] for recipe in recipes)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_latents_have_equally_many_numbers(preset):
    def numbers(name):
        recipe = recipe_of(name, preset)
        model, side = recipe["model"], recipe["resolution"] // recipe["model"]["patch_size"]
        return (model["num_latent_tokens"] or side**2) * model["latent_channels"]

    counts = {name: numbers(name) for name, variant in VARIANTS.items() if variant.base is None}
    assert len(set(counts.values())) == 1, counts
    for name in ("maetok", "image-tokens", "kl-vae"):
        recipe = recipe_of(name, preset)
        sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 1}
        tokenizer = AutoencoderMAE(sample_size=preset.resolution, **(recipe["model"] | sizes))
        assert tokenizer.latent_sequence_length * tokenizer.config.latent_channels == counts[name]


def test_masks_learnable_tokens_and_targets_are_combined_in_all_eight_ways_once():
    found = [variant.factors for variant in VARIANTS.values() if variant.factors is not None]
    assert sorted(found) == list(itertools.product([False, True], repeat=3))


def test_variants_and_claims_name_what_there_is():
    for variant in VARIANTS.values():
        assert variant.base is None or VARIANTS[variant.base].has_generator
        assert len({variant.title for variant in VARIANTS.values()}) == len(VARIANTS)
    measures = make_measures(CPU.budget.mixture_size)
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= VARIANTS.keys() and claim.measure in measures


def test_bases_come_before_what_is_fine_tuned_from_them_and_whole_seeds_before_the_next():
    cells = make_cells(CPU, ["maetok-finetuned", "maetok", "autoencoder"], [3, 1], RECIPES)
    names = ["autoencoder", "maetok", "maetok-finetuned"]
    assert [cell.name for cell in cells] == [f"cpu-{name}-seed{seed}" for seed in (3, 1) for name in names]
    everything = [cell.variant.name for cell in make_cells(CPU, list(VARIANTS), [0], RECIPES)]
    assert everything == list(VARIANTS)
    for name, variant in VARIANTS.items():
        assert variant.base is None or everything.index(variant.base) < everything.index(name)


def test_a_fine_tuned_tokenizer_has_its_base_and_that_ones_generator():
    cell = cell_of("maetok-finetuned", seed=1)
    assert cell.base == cell_of("maetok", seed=1)
    root = Path("root")
    assert cell.generator(root) == cell.base.generator(root) != cell_of("maetok", seed=0).generator(root)
    words = cell.stages(root)[0].words
    assert flag(words, "--pretrained_model_name_or_path") == str(cell.base.tokenizer(root))
    assert cell.commands(2) == [*cell.base.commands(2), cell.stages(module.RECORDED_ROOT)[0].command(2)]
    identity = cell.identity("data", "classifier")
    assert identity["base"] == cell.base.settings() and "base" not in cell.base.identity("data", "classifier")
    assert changed(cell, tokenizer_steps=2999).identity("data", "classifier") != identity


def test_identities_tell_cells_apart():
    cell = cell_of("maetok")
    others = [
        cell_of("maetok", seed=1),
        cell_of("autoencoder"),
        cell_of("maetok", PRESETS["gpu"]),
        *(changed(cell, **{name: 7}) for name in ("tokenizer_steps", "generator_steps", "num_samples", "loss_draws")),
        changed(cell, mixture_sizes=(1, 50)),
        changed(cell, probe_l2=0.1),
    ]
    identities = [other.identity("data", "classifier") for other in (cell, *others)]
    identities += [cell.identity("other", "classifier"), cell.identity("data", "other")]
    texts = [json.dumps(identity, sort_keys=True) for identity in identities]
    assert len(set(texts)) == len(texts)
    assert cell_of("maetok").identity("data", "classifier") == identities[0]
    assert json.loads(texts[0]) == identities[0], "plain types"


def test_a_changed_recipe_is_another_cell(tmp_path):
    for path in RECIPES.glob("demo-*.yaml"):
        text = path.read_text()
        if path.name == "demo-sit.yaml":
            text = text.replace("ema_decay: 0.998", "ema_decay: 0.99")
            assert text != path.read_text()
        (tmp_path / path.name).write_text(text)
    cell, other = cell_of("maetok"), dataclasses.replace(cell_of("maetok"), recipes=tmp_path)
    assert cell.settings()["stages"] == other.settings()["stages"] and cell.settings() != other.settings()


def test_records_and_commands_know_no_place():
    """The folder of the recipes and of the outputs may be anywhere."""
    for cell in map(cell_of, ("image-tokens", "maetok-finetuned", "two-sizes-rope")):
        text = json.dumps(cell.identity("data", "classifier")) + "".join(cell.commands(2))
        assert str(RECIPES.parents[1]) not in text and "outputs/study/cpu" in text
        for command in cell.commands(3):
            assert command.startswith("accelerate launch ") and "--num_cpu_threads_per_process 3" in command
            assert (RECIPES.parents[1] / command.split(" examples/")[1].split()[0]).parent == RECIPES.parents[1]
            assert (RECIPES.parent / command.split(" examples/")[1].split()[0]).is_file()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [1, 20, 50, 100, 500, 501])
def test_studies_of_any_length_can_be_tried_out(preset, steps):
    short = StudyOptions(preset=preset, max_train_steps=steps, results_dir="x").chosen_preset()
    for cell in (cell_of("maetok", short), cell_of("maetok-finetuned", short)):
        for recipe in filter(None, cell.settings()["recipes"].values()):
            assert recipe["max_train_steps"] <= steps and recipe["lr_warmup_steps"] < steps


def test_no_training_of_the_study_itself_lacks_its_warm_up():
    for preset in PRESETS.values():
        for name, stage in [("maetok", 0), ("maetok", 2), ("maetok-finetuned", 0)]:
            assert recipe_of(name, preset, stage)["lr_warmup_steps"] > 0
            assert "--lr_warmup_steps" not in cell_of(name, preset).stages(Path("root"))[stage].words


def test_generators_leave_checkpoints_where_they_are_measured():
    for steps in (2500, 20_000, 4, 3, 30):
        cell = changed(cell_of("maetok"), generator_steps=steps)
        words = cell.stages(Path("root"))[2].words
        every = int(flag(words, "--checkpointing_steps"))
        assert all(step % every == 0 for step in cell.preset.budget.curve_steps())
        assert int(flag(words, "--checkpoints_total_limit")) > steps // every


def test_the_core_on_a_cpu_is_planned_for_less_than_90_minutes():
    cells = make_cells(CPU, CORE, [0, 1, 2], RECIPES)
    seconds = [cell.estimated_seconds() for cell in cells]
    assert len(cells) == 12 and CPU.measured
    total = sum(sum(parts.values()) for parts in seconds)
    assert 60 * 60 < total < 90 * 60
    assert seconds[0].keys() == {"tokenizer", "latents", "generator", "measures"}
    tuned = seconds[3]
    assert tuned.keys() == {"tokenizer", "measures"} and sum(tuned.values()) < sum(seconds[2].values()) / 2


def test_estimates_grow_with_what_is_done():
    cell = cell_of("maetok")
    before = cell.estimated_seconds()
    for name, part in [
        ("tokenizer_steps", "tokenizer"),
        ("generator_steps", "generator"),
        ("num_samples", "measures"),
    ]:
        longer = changed(cell, **{name: 4 * getattr(CPU.budget, name)}).estimated_seconds()
        assert longer[part] > 2 * before[part]
        assert {key: longer[key] for key in before if key != part} == pytest.approx(
            {key: before[key] for key in before if key != part}
        )


def test_a_data_worker_is_no_part_of_a_cell():
    cell = cell_of("maetok")
    for stage in cell.stages(Path("root")):
        assert "--dataloader_num_workers" not in stage.words
        assert stage.arguments(1) == [*stage.words, "--dataloader_num_workers", "0"]
        assert stage.arguments(2) == stage.arguments(8) == [*stage.words, "--dataloader_num_workers", "1"]
    assert all("--dataloader_num_workers 1" in line for line in cell.commands(2))
