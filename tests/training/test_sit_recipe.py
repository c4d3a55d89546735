"""The recipes of generators: published values, architectures, and nothing accepted that has no effect."""

from pathlib import Path

import pytest
import torch

from maetok_hf import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SHIPPED = sorted(
    path
    for path in RECIPES.rglob("*.yaml")
    if {"sit", "lightningdit", "usit"} & set(path.stem.split("-")) and "lora" not in path.stem
)
# parameters with 1000 classes, in millions
PARAMETERS = {"sit-s": 33, "sit-b": 130, "sit-l": 458, "sit-xl": 675, "lightningdit-b": 130, "lightningdit-xl": 675}
PARAMETERS |= {"usit-h": 501, "usit-2b": 1580}


@pytest.fixture
def write(tmp_path):
    def write_recipe(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_recipe


def shipped(name):
    return load_recipe(SiTRecipe, RECIPES / f"{name}.yaml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_begins_with_its_expected_result_and_cost_and_loads(path):
    recipe = load_recipe(SiTRecipe, path)
    comments = path.read_text().splitlines()
    assert comments[0].startswith("# Expected: ")
    (cost,) = [line for line in comments[:5] if line.startswith("# Cost: ")]
    assert any(character.isdigit() for character in cost)
    assert recipe.max_train_steps > recipe.lr_warmup_steps
    assert path.stem.startswith("demo") or str(recipe.resolution) in path.stem.split("-")


@pytest.mark.parametrize("name", [f"{size}-{side}" for size in PARAMETERS for side in (256, 512)])
def test_every_published_size_has_a_recipe_at_both_resolutions_with_its_number_of_parameters(name):
    recipe = shipped(name)
    assert recipe.architecture == name.split("-")[0] and not recipe.finetuning and not recipe.guidance_free
    with torch.device("meta"):
        transformer = recipe.transformer_class(**recipe.model)
    size, side = name.rsplit("-", 1)
    assert transformer.num_parameters() == pytest.approx(PARAMETERS[size] * 1e6, rel=0.01)
    assert recipe.resolution == int(side)


@pytest.mark.parametrize(
    ("name", "batch", "steps", "rate", "betas", "warmup", "density", "direction"),
    [
        ("sit-xl-256", 256, 4_000_000, 1e-4, (0.9, 0.999), 0, "uniform", 0.0),
        ("sit-l-512", 256, 400_000, 1e-4, (0.9, 0.999), 0, "uniform", 0.0),
        ("lightningdit-xl-256", 1024, 400_000, 2e-4, (0.9, 0.95), 0, "lognormal", 1.0),
        ("lightningdit-b-512", 1024, 400_000, 2e-4, (0.9, 0.95), 0, "lognormal", 1.0),
        ("usit-2b-512", 1024, 500_000, 1e-4, (0.99, 0.99), 5000, "uniform", 0.0),
        ("usit-h-256", 1024, 500_000, 1e-4, (0.99, 0.99), 5000, "uniform", 0.0),
    ],
)
def test_recipes_have_the_published_optimisation(name, batch, steps, rate, betas, warmup, density, direction):
    recipe = shipped(name)
    assert (recipe.total_batch_size, recipe.max_train_steps, recipe.learning_rate) == (batch, steps, rate)
    assert (recipe.adam_beta1, recipe.adam_beta2) == betas and recipe.lr_warmup_steps == warmup
    assert (recipe.weight_decay, recipe.ema_decay, recipe.max_grad_norm) == (0.0, 0.9999, 1.0)
    assert (recipe.lr_scheduler, recipe.scale_learning_rate, recipe.time_shift) == ("constant", False, 1.0)
    assert (recipe.time_density, recipe.direction_weight) == (density, direction)


@pytest.mark.parametrize(
    ("name", "scale", "interval"),
    [
        ("sit-xl-256", 1.9, (0.0, 0.75)),
        ("sit-xl-512", 1.5, (0.0, 0.7)),
        ("lightningdit-xl-256", 1.8, (0.0, 0.75)),
        ("lightningdit-xl-512", 1.6, (0.0, 0.65)),
    ],
)
def test_samples_are_guided_as_published(name, scale, interval):
    arguments = shipped(name).sampling_arguments
    assert arguments == {"guidance_scale": scale, "guidance_interval": interval, "num_inference_steps": 250}


def test_guidance_free_recipes_keep_the_setting_they_start_from():
    finetuned, trained = shipped("sit-xl-256-gft"), shipped("sit-xl-256")
    assert finetuned.guidance_free and finetuned.finetuning and finetuned.model == {}
    assert (finetuned.total_batch_size, finetuned.ema_decay) == (trained.total_batch_size, trained.ema_decay)
    assert finetuned.learning_rate_at(0) == 1e-4 and finetuned.learning_rate_at(140_000) == pytest.approx(1e-5)
    assert finetuned.sampling_arguments == trained.sampling_arguments  # at the optimum it is the same velocity
    scratch = shipped("sit-b-256-gft")
    assert scratch.guidance_free and not scratch.finetuning and scratch.model == shipped("sit-b-256").model


def test_alignment_recipe_differs_from_its_baseline_in_the_alignment_alone():
    aligned, plain = (vars(shipped(name)) for name in ("sit-l-256-repa", "sit-l-256"))
    assert {name for name in aligned if aligned[name] != plain[name]} == {"alignment_weight"}
    assert (aligned["alignment_weight"], aligned["alignment_layer"], aligned["alignment_hidden_size"]) == (
        0.5,
        8,
        2048,
    )


@pytest.mark.parametrize(
    ("architecture", "model_class"),
    [
        ("sit", SiTTransformer1DModel),
        ("lightningdit", LightningDiTTransformer1DModel),
        ("usit", USiTTransformer1DModel),
    ],
)
def test_model_section_is_checked_against_the_architecture(write, architecture, model_class):
    assert SiTRecipe(architecture=architecture).transformer_class is model_class
    with pytest.raises(
        ValueError, match=f"'num_layer', which {model_class.__name__} lacks; did you mean 'num_layers'"
    ):
        load_recipe(SiTRecipe, write(f"architecture: {architecture}\nmodel: {{num_layer: 3}}\n"))


def test_setting_of_another_architecture_is_refused(write):
    assert load_recipe(SiTRecipe, write("architecture: lightningdit\nmodel: {qk_norm: true}\n")).model["qk_norm"]
    with pytest.raises(ValueError, match="'qk_norm', which SiTTransformer1DModel lacks"):
        load_recipe(SiTRecipe, write("model: {qk_norm: true}\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("architecture: dit\n", "`architecture` must be one of 'sit', 'lightningdit', 'usit', got 'dit'"),
        ("model: {sample_size: 64}\n", "must not set 'sample_size': it is determined by the tokenizer"),
        ("model: {temperature_embedding: true}\n", "must not set 'temperature_embedding': .* by `guidance_free`"),
        ("guidance_free: true\nmodel: {class_dropout_prob: 0.0}\n", "`guidance_free` learns .* class_dropout_prob=0"),
        ("direction_weight: -1\n", "`direction_weight` must be 0 or more, got -1.0"),
        ("direction_weight: .inf\n", "`direction_weight` must be finite, got inf"),
        ("alignment_weight: .nan\n", "`alignment_weight` must be 0 or more, got nan"),
        ("alignment_weight: 0.5\nalignment_layer: 0\n", "`alignment_layer` must be positive, got 0"),
        ("alignment_weight: 0.5\nalignment_hidden_size: 0\n", "`alignment_hidden_size` must be positive, got 0"),
        ("time_shift: 0\n", "`time_shift` must be positive, got 0.0"),
        ("time_shift: .inf\n", "`time_shift` must be finite, got inf"),
        ("guidance_scale: 0.9\n", "`guidance_scale` must be at least 1, which is no guidance, got 0.9"),
        ("guidance_scale: 2\nguidance_interval: [0.5]\n", r"`guidance_interval` must be two times.*\[0.5\]"),
        ("guidance_scale: 2\nguidance_interval: [0.5, 0.1]\n", r"`guidance_interval` .*\[0.5, 0.1\]"),
        ("guidance_scale: 2\nguidance_interval: [0, 1.5]\n", r"`guidance_interval` .*\[0.0, 1.5\]"),
        ("num_inference_steps: 0\n", "`num_inference_steps` must be positive, got 0"),
    ],
)
def test_bad_value_is_an_error_that_names_it(write, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SiTRecipe, write(text))


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("alignment_layer: 4\n", "alignment_layer", "`alignment_weight` is 0"),
        ("alignment_hidden_size: 4\n", "alignment_hidden_size", "`alignment_weight` is 0"),
        ("alignment_model: x\n", "alignment_model", "`alignment_weight` is 0"),
        ("alignment_weight: 0\nalignment_dtype: float32\n", "alignment_dtype", "`alignment_weight` is 0"),
        ("finetuning: true\nmodel: {num_layers: 3}\n", "model", "`finetuning` keeps the trained transformer's"),
        ("guidance_interval: [0.0, 0.5]\n", "guidance_interval", "`guidance_scale` is 1"),
        ("final_learning_rate_fraction: 0.1\n", "final_learning_rate_fraction", "`lr_scheduler` is 'constant'"),
    ],
)
def test_setting_without_effect_is_an_error_that_says_why(write, text, name, reason):
    with pytest.raises(ValueError, match=f"`{name}` is set but has no effect, since {reason}"):
        load_recipe(SiTRecipe, write(text))


def test_every_architecture_of_the_demo_is_of_the_demos_setting():
    base = vars(shipped("demo-sit"))
    for name in ("demo-lightningdit", "demo-usit", "demo-sit-gft"):
        recipe = shipped(name)
        assert (recipe.resolution, recipe.random_flip, recipe.total_batch_size) == (
            32,
            False,
            base["total_batch_size"],
        )
        assert (recipe.guidance_scale, recipe.num_inference_steps) == (1.5, 50)
