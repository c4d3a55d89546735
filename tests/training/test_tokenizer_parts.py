"""The whole recipe as modules: one step of it, with tiny networks of random weights, at the published geometry."""

import dataclasses
from pathlib import Path

import pytest
import torch

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.seeding import keyed_seed
from maetok_hf.training.auxiliary import AuxiliaryDecoder
from maetok_hf.training.discriminator_objective import sample_adversarial_draws
from maetok_hf.training.draws import sample_noise
from maetok_hf.training.masking import sample_masks
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.tokenizer_parts import (
    make_caption_tokenizer,
    make_discriminator_objective,
    make_targets,
    make_tokenizer,
    make_tokenizer_objective,
)
from maetok_hf.training.tokenizer_recipe import TokenizerRecipe
from tests.networks import CAPTIONS, save_networks


MODEL = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_latent_tokens": 8, "latent_channels": 4}
SIZES = {"auxiliary_hidden_size": 16, "auxiliary_num_layers": 1, "auxiliary_num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def networks(folder):
    return save_networks(folder)


@pytest.fixture
def full_recipe(networks, folder, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(folder))

    def make(resolution=256, **settings):
        settings = SIZES | networks | {"discriminator_image_size": 32, "adversarial_start_step": 0} | settings
        settings.setdefault("model", MODEL | {"modulated_decoder": True, "decoder_class_token": False})
        return TokenizerRecipe(resolution=resolution, **settings)

    return make


def parts_of(recipe):
    tokenizer = make_tokenizer(recipe, 0, None)
    captions = make_caption_tokenizer(recipe)
    discriminator = make_discriminator_objective(recipe, 0)
    objective = make_tokenizer_objective(recipe, tokenizer, 0, discriminator, captions)
    return objective.train(), discriminator and discriminator.train(), captions


def inputs_of(recipe, captions=None, batch_size=1):
    generator = torch.Generator().manual_seed(0)
    side = recipe.resolution
    images = torch.rand(batch_size, 3, side, side, generator=generator) * 2 - 1
    indices = list(range(batch_size))
    inputs = {
        "pixel_values": images,
        "mask": sample_masks(0, 0, indices, (side // 16) ** 2, 0.5),
        "scales": recipe.loss_scales_at(0),
        "adversarial_draws": sample_adversarial_draws(0, "generator", 0, indices),
    }
    if captions is not None:
        inputs["token_indices"] = captions(CAPTIONS[:batch_size])
    return inputs


@pytest.mark.parametrize("resolution", [256, 512])
def test_one_step_of_the_full_recipe(full_recipe, resolution):
    recipe = full_recipe(resolution, auxiliary_targets=["hog", "dinov2", "siglip", "text"])
    objective, discriminator, captions = parts_of(recipe)
    inputs = inputs_of(recipe, captions)
    optimizers = [recipe.make_optimizer(objective), recipe.make_optimizer(discriminator)]
    before = [parameter.detach().clone() for parameter in (*objective.parameters(), *discriminator.parameters())]

    terms, reconstruction = objective(**inputs)
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert set(terms) == {
        *("loss", "reconstruction", "perceptual", "adversarial", "adaptive_weight"),
        *("hog", "dinov2", "siglip", "text"),
    }
    gradients = [parameter.grad.clone() for parameter in objective.parameters()]
    draws = sample_adversarial_draws(0, "discriminator", 0, [0])
    opinion = discriminator(inputs["pixel_values"], reconstruction, draws)
    opinion["loss"].backward()
    for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    for optimizer in optimizers:
        optimizer.step()
    assert all(value.isfinite() for value in (terms | opinion).values())
    after = [*objective.parameters(), *discriminator.parameters()]
    moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    # what cannot reach the pixels has no gradient, and tokens and norms do not decay
    assert sum(moved) > 0.85 * len(moved)


@pytest.mark.parametrize(
    "settings",
    [
        {"auxiliary_targets": [], "mask_ratio_min": 0.0, "mask_ratio_max": 0.0},
        {"model": MODEL | {"gaussian_posterior": True}, "auxiliary_targets": []},
        {"auxiliary_targets": ["hog"]},
        {"auxiliary_targets": ["dinov2"], "teacher_loss": "mse", "teacher_dtype": "float32"},
        {"auxiliary_targets": ["siglip"]},
        {"auxiliary_num_layers": 0},
        {"auxiliary_num_layers": 12, "auxiliary_targets": ["hog"]},
        {"model": MODEL | {"num_latent_tokens": 0}},
        {"model": MODEL | {"num_latent_tokens": 16}, "auxiliary_targets": ["hog"]},
        {"model": MODEL | {"position_embedding": "absolute"}},
        {"adversarial_loss": "non_saturating", "adaptive_adversarial_weight": False, "consistency_weight": 0.0},
        {"discriminator_input": "crop", "diffaugment": ["color"], "lecam_weight": 0.0},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_ablation_is_a_recipe(full_recipe, settings):
    recipe = full_recipe(64, **settings)
    objective, _, _ = parts_of(recipe)
    inputs = inputs_of(recipe, batch_size=2)
    if recipe.mask_ratio_max == 0:
        del inputs["mask"]
    if recipe.model.get("gaussian_posterior"):
        inputs["posterior_noise"] = sample_noise(0, "posterior", 0, [0, 1], (8, 4))
    terms, _ = objective(**inputs)
    terms["loss"].backward()
    expected = {*recipe.feature_targets, "loss", "reconstruction", "perceptual", "adversarial"}
    assert expected <= set(terms)
    assert ("kl" in terms) == recipe.model.get("gaussian_posterior", False)
    assert objective.tokenizer.encoder.patch_embed.weight.grad.abs().sum() > 0


ABLATIONS = sorted((Path(__file__).parents[2] / "examples" / "recipes" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_every_shipped_ablation_builds_and_learns(full_recipe, path):
    tiny = full_recipe(64)
    recipe = load_recipe(TokenizerRecipe, path)
    model = recipe.model | {name: MODEL[name] for name in MODEL if name != "num_latent_tokens"}
    model["num_latent_tokens"] = min(recipe.model["num_latent_tokens"], 8)
    names = ("discriminator_model", "dinov2_model", "siglip_model", "text_tokenizer", "perceptual_network", *SIZES)
    settings = {name: getattr(tiny, name) for name in names} | {"auxiliary_num_layers": recipe.auxiliary_num_layers}
    settings |= {"discriminator_image_size": 32, "adversarial_start_step": 0, "mixed_resolutions": []}
    recipe = dataclasses.replace(recipe, resolution=64, model=model, mixed_resolution_weights=[], **settings)
    objective, _, captions = parts_of(recipe)
    inputs = inputs_of(recipe, captions)
    if recipe.model.get("gaussian_posterior"):
        inputs["posterior_noise"] = sample_noise(0, "posterior", 0, [0], (8, 4))
    objective(**inputs)[0]["loss"].backward()
    assert objective.tokenizer.encoder.patch_embed.weight.grad.abs().sum() > 0


def test_an_ablation_leaves_the_other_decoders_and_the_tokenizer_as_they_were(full_recipe):
    whole, _, _ = parts_of(full_recipe(64))
    fewer, _, _ = parts_of(full_recipe(64, auxiliary_targets=["siglip"], adversarial_weight=0.0))
    for name, value in fewer.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_initialisation_leaves_the_random_state_of_the_caller_alone(full_recipe, tmp_path):
    recipe = full_recipe(64, auxiliary_targets=["hog", "dinov2", "siglip", "text"])
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    objective, _, _ = parts_of(recipe)
    assert torch.equal(torch.random.get_rng_state(), state)
    objective.tokenizer.save_pretrained(tmp_path)
    make_tokenizer(dataclasses.replace(recipe, stage="decoder_finetuning", model={}), 0, str(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_initial_weights_are_those_of_their_seed_whatever_the_random_state_of_the_caller(full_recipe):
    recipe = full_recipe(64)
    torch.manual_seed(6)
    objective, discriminator, _ = parts_of(recipe)
    torch.manual_seed(keyed_seed(0, "initialisation"))
    same_as = {"tokenizer": AutoencoderMAE(sample_size=64, **recipe.model)}
    for name, target in objective.targets.items():
        torch.manual_seed(keyed_seed(0, f"initialisation of the {name} decoder"))
        sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
        config = objective.tokenizer.config
        same_as[f"auxiliary_decoders.{name}"] = AuxiliaryDecoder.from_tokenizer_config(
            config, target.feature_dim, **sizes
        )
    for name, expected in same_as.items():
        weights = objective.get_submodule(name).state_dict()
        assert all(torch.equal(weights[key], value) for key, value in expected.state_dict().items()), name
    torch.manual_seed(7)
    _, again, _ = parts_of(recipe)
    weights = discriminator.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in again.state_dict().items())


def test_augmentation_is_as_strong_as_the_recipe_says(full_recipe):
    discriminator = make_discriminator_objective(full_recipe(64), 0)
    assert (discriminator.diffaugment_probability, discriminator.diffaugment_cutout) == (0.5, 0.2)
    recipe = full_recipe(64, diffaugment_probability=1.0, diffaugment_cutout=0.5)
    discriminator = make_discriminator_objective(recipe, 0)
    assert (discriminator.diffaugment_probability, discriminator.diffaugment_cutout) == (1.0, 0.5)


def test_losses_that_weigh_nothing_load_nothing():
    recipe = TokenizerRecipe(
        resolution=64, model=MODEL, auxiliary_targets=["hog"], perceptual_weight=0, adversarial_weight=0, **SIZES
    )
    objective, discriminator, captions = parts_of(recipe)
    assert (discriminator, captions, objective.perceptual) == (None, None, None)


def test_teachers_are_what_the_recipe_says(full_recipe):
    targets = make_targets(full_recipe(64, teacher_dtype="float16"), 16)
    assert list(targets) == ["hog", "dinov2", "siglip"]
    assert {next(targets[name].parameters()).dtype for name in ("dinov2", "siglip")} == {torch.float16}
    assert {targets[name].feature_loss for name in ("dinov2", "siglip")} == {"cosine"}
    assert targets["hog"].feature_loss == "mse"


def test_decoder_finetuning_has_pixel_terms_only(full_recipe, tmp_path):
    recipe = full_recipe(64)
    make_tokenizer(recipe, 0, None).save_pretrained(tmp_path)
    second = dataclasses.replace(recipe, stage="decoder_finetuning", model={})
    tokenizer = make_tokenizer(second, 0, str(tmp_path))
    objective = make_tokenizer_objective(second, tokenizer, 0, make_discriminator_objective(second, 0))
    terms, _ = objective(**inputs_of(second))
    assert set(terms) == {"loss", "reconstruction", "perceptual", "adversarial", "adaptive_weight"}
    assert list(objective.auxiliary_decoders) == []


def test_decoder_finetuning_needs_a_tokenizer_of_its_resolution(full_recipe, tmp_path):
    make_tokenizer(full_recipe(64), 0, None).save_pretrained(tmp_path)
    second = dataclasses.replace(full_recipe(128), stage="decoder_finetuning", model={})
    with pytest.raises(ValueError, match="`resolution` is 128, but .* is built for 64"):
        make_tokenizer(second, 0, str(tmp_path))


def test_resolution_must_be_whole_patches(full_recipe):
    with pytest.raises(ValueError, match="a resolution of the recipe is 72, but must be a multiple"):
        make_tokenizer(full_recipe(64, mixed_resolutions=[64, 72]), 0, None)
