"""What training costs: operations that can be counted by hand, and recipes that say what was computed."""

import dataclasses
import json

import pytest
import torch

from benchmarks import training_cost, training_step
from benchmarks.machine import RESULTS
from benchmarks.training_cost import count, count_parts, training_flops
from benchmarks.training_step import RECIPES, TrainingStep, read_recipe, tokenizer_recipes
from maetok_hf.models.layers import MAETokAttention


TINY = {
    "model": {"patch_size": 16, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 1, "num_latent_tokens": 4},
    "resolution": 32,
    "auxiliary_hidden_size": 16,
    "auxiliary_num_layers": 1,
    "auxiliary_num_attention_heads": 1,
    "discriminator_model": "test_vit",  # timm's
    "discriminator_image_size": 32,
    "perceptual_network": "squeeze",
}
TEACHER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


@pytest.fixture
def tiny_recipe(monkeypatch):
    """The published recipe at a tiny size."""
    sizes = {
        "facebook/dinov2-large": ("Dinov2Config", TEACHER | {"patch_size": 14}),
        "google/siglip-so400m-patch14-224": ("SiglipVisionConfig", TEACHER | {"patch_size": 14}),
    }
    for name, config in sizes.items():
        monkeypatch.setitem(training_step.TEACHERS, name, config)
    return dataclasses.replace(read_recipe("maetok-b-128-256")[0], **TINY)


def test_a_linear_layer_takes_two_operations_per_weight_and_row_and_twice_as_many_backward():
    layer = torch.nn.Linear(5, 7)
    rows = torch.zeros(3, 5)
    assert count(lambda: layer(rows)) == 2 * 3 * 5 * 7
    assert count(lambda: layer(rows).sum().backward()) == 2 * 2 * 3 * 5 * 7  # no gradient of the rows
    rows.requires_grad_()
    assert count(lambda: layer(rows).sum().backward()) == 3 * 2 * 3 * 5 * 7


def test_attention_takes_two_products_and_twice_as_many_backward():
    query = torch.zeros(1, 2, 6, 4, requires_grad=True)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count(lambda: attention(query, query, query).sum().backward()) == 3 * 2 * (2 * 2 * 6 * 6 * 4)


def test_keys_that_only_cpus_pad_do_not_count():
    attention = MAETokAttention(8, 2, 4).to(torch.bfloat16)
    tokens = torch.zeros(1, 200, 8, dtype=torch.bfloat16)
    assert count(lambda: attention(tokens)) == 2 * 4 * 200 * 8 * 8 + 2 * 2 * 200 * 200 * 8


@pytest.mark.parametrize("stage", ["mask_modelling", "decoder_finetuning"])
def test_parts_sum_to_the_whole_step_and_the_step_is_linear_in_images(tiny_recipe, stage):
    recipe = tiny_recipe
    if stage == "decoder_finetuning":
        recipe = dataclasses.replace(tiny_recipe, stage=stage, model={})
    step = TrainingStep(recipe, tiny_recipe)
    step.allocate("cpu")
    parts = count_parts(step, 32)
    assert sum(parts.values()) == count(lambda: step.passes(1, 32))
    assert 3 * sum(parts.values()) == count(lambda: step.passes(3, 32))
    without = sum(value for name, value in parts.items() if name not in training_cost.ADVERSARIAL)
    assert without == count(lambda: step.passes(1, 32, adversarial=False))
    names = {"encoder", "decoder", "LPIPS", *training_cost.ADVERSARIAL}
    if stage == "mask_modelling":
        names |= {f"{target} {part}" for target in ("hog", "dinov2", "siglip") for part in ("target", "decoder")}
    assert parts.keys() == names
    assert parts["hog target"] == 0 if stage == "mask_modelling" else parts["encoder"] < parts["decoder"]


def test_steps_before_the_discriminator_begins_are_without_it(tiny_recipe):
    recipe = dataclasses.replace(
        tiny_recipe, total_batch_size=2, max_train_steps=20_000, adversarial_start_step=15_000
    )
    parts = {32: {"encoder": 7, "adversarial term": 10, "discriminator's step": 20, "adaptive weight": 1}}
    assert training_flops(recipe, parts) == 2 * (20_000 * 7 + 5_000 * 31)


def test_mixed_resolutions_count_by_their_weights(tiny_recipe):
    mixed = {"mixed_resolutions": [32, 64], "mixed_resolution_weights": [3.0, 1.0]}
    recipe = dataclasses.replace(tiny_recipe, total_batch_size=4, **mixed)
    parts = {32: {"encoder": 100}, 64: {"encoder": 500}}
    assert training_flops(recipe, parts) == pytest.approx(4 * recipe.max_train_steps * 200)


def test_days_are_those_of_one_device_at_the_assumed_share_of_its_peak():
    days = training_cost.device_days(0.4 * 312e12 * 86400 * 5)
    assert days["A100"] == pytest.approx(5)
    assert days["H100"] == pytest.approx(5 * 312 / 989)


def test_cost_replaces_its_paragraph_and_nothing_else():
    text = "# Expected: a\n# b\n# Cost: old\n# older\n#\n# Text.\n\nextends: base\n"
    new = training_cost.with_cost(text, 2.6e20)
    lines = new.splitlines()
    assert lines[2] == (
        "# Cost: computed, not measured: 2.6e20 FLOPs, about 24 A100 days or 7.6 H100 days "
        "at 40 % of the dense bf16 peak"
    )
    assert [*lines[:2], *lines[4:]] == ["# Expected: a", "# b", "#", "# Text.", "", "extends: base"]
    assert lines[3] == "# (python -m benchmarks.training_cost)."
    assert training_cost.with_cost(new, 2.6e20) == new
    assert max(map(len, lines)) <= 128


def test_every_recipe_states_the_cost_that_was_computed():
    costs = json.loads((RESULTS / "training_cost.json").read_text(encoding="utf-8"))["recipes"]
    assert list(costs) == tokenizer_recipes()
    for name, cost in costs.items():
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        assert training_cost.with_cost(text, cost["training_flops"]) == text, f"{name}: {training_cost.COMMAND}"
        assert training_flops(
            read_recipe(name)[0], {int(size): parts for size, parts in cost["flops_per_image"].items()}
        ) == pytest.approx(cost["training_flops"])
