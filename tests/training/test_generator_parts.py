"""From a recipe to the transformer and the objective of a generator, from scratch and from a trained pipeline."""

import dataclasses

import pytest
import torch

from maetok_hf import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.training.flow_matching import sample_flow_draws
from maetok_hf.training.generator_parts import make_flow_objective, make_transformer
from maetok_hf.training.sit_recipe import SiTRecipe
from tests.networks import save_networks


MODEL = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
LATENTS = (4, 3)
ARCHITECTURES = {
    "sit": SiTTransformer1DModel,
    "lightningdit": LightningDiTTransformer1DModel,
    "usit": USiTTransformer1DModel,
}


def make_recipe(**settings):
    return SiTRecipe(**{"model": MODEL} | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of pipelines, as far as their transformer, by architecture."""
    folders = {}
    for name in ARCHITECTURES:
        transformer = make_transformer(make_recipe(architecture=name), LATENTS, 5, seed=0)
        with torch.no_grad():
            for parameter in transformer.parameters():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        folders[name] = tmp_path_factory.mktemp(name)
        transformer.save_pretrained(folders[name] / "transformer")
    return folders


def inputs_of(transformer, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *LATENTS, generator=generator)
    return x, torch.tensor([0.3, 0.8]), torch.tensor([0, transformer.config.num_classes])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_new_transformer_has_the_shape_of_the_latents_and_the_classes_of_the_data(name):
    transformer = make_transformer(make_recipe(architecture=name), LATENTS, 5, seed=0)
    assert type(transformer) is ARCHITECTURES[name]
    config = transformer.config
    assert (config.sample_size, config.in_channels, config.num_classes, config.num_layers) == (*LATENTS, 5, 3)
    assert not config.temperature_embedding
    guidance_free = make_transformer(make_recipe(architecture=name, guidance_free=True), LATENTS, 5, seed=0)
    assert guidance_free.config.temperature_embedding
    for key, value in transformer.state_dict().items():  # the seed decides, not the embedding
        assert torch.equal(value, guidance_free.state_dict()[key])
    other = make_transformer(make_recipe(architecture=name), LATENTS, 5, seed=1)
    assert not torch.equal(transformer.class_embed.weight, other.class_embed.weight)


def test_number_of_classes_is_known_once():
    recipe = make_recipe(model=MODEL | {"num_classes": 7})
    assert make_transformer(recipe, LATENTS, None, 0).config.num_classes == 7
    assert make_transformer(recipe, LATENTS, 7, 0).config.num_classes == 7
    with pytest.raises(ValueError, match="`model` sets num_classes=7, but the data set has 5 classes"):
        make_transformer(recipe, LATENTS, 5, 0)
    with pytest.raises(ValueError, match="give `--model num_classes"):
        make_transformer(make_recipe(), LATENTS, None, 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("guidance_free", [False, True])
def test_finetuning_begins_with_the_trained_outputs_at_every_temperature(trained, name, guidance_free):
    recipe = SiTRecipe(architecture=name, finetuning=True, guidance_free=guidance_free)
    transformer = make_transformer(recipe, LATENTS, None, 0, str(trained[name])).eval()
    original = ARCHITECTURES[name].from_pretrained(trained[name], subfolder="transformer").eval()
    inputs = inputs_of(original)
    options = {"guidance_temperature": torch.tensor([0.2, 0.9])} if guidance_free else {}
    with torch.no_grad():
        expected = original(*inputs).sample
        assert expected.abs().max() > 0.01 and torch.equal(transformer(*inputs, **options).sample, expected)
    assert transformer.config.temperature_embedding == guidance_free
    for parameter in transformer.parameters():
        assert parameter.requires_grad


def test_a_guidance_free_model_is_finetuned_further_with_the_embedding_it_has(trained, tmp_path):
    recipe = SiTRecipe(finetuning=True, guidance_free=True)
    transformer = make_transformer(recipe, LATENTS, 5, 0, str(trained["sit"]))
    torch.nn.init.normal_(transformer.temperature_embed.linear_2.weight)
    transformer.save_pretrained(tmp_path / "transformer")
    again = make_transformer(recipe, LATENTS, 5, 1, str(tmp_path))
    for key, value in transformer.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    with pytest.raises(ValueError, match="`temperature_embedding`, which only `guidance_free` training trains"):
        plain = dataclasses.replace(recipe, guidance_free=False)
        make_flow_objective(plain, make_transformer(plain, LATENTS, 5, 0, str(tmp_path)), 16, 0)


def test_a_trained_transformer_that_does_not_fit_is_refused(trained, tmp_path):
    recipe, source = SiTRecipe(finetuning=True), str(trained["sit"])
    with pytest.raises(
        ValueError, match="`architecture` is 'usit', a USiTTransformer1DModel, .* is a SiTTransformer1D"
    ):
        make_transformer(dataclasses.replace(recipe, architecture="usit"), LATENTS, 5, 0, source)
    with pytest.raises(ValueError, match="made for 4 tokens of 3 channels, but the tokenizer has 8 of 3"):
        make_transformer(recipe, (8, 3), 5, 0, source)
    with pytest.raises(ValueError, match="made for 5 classes, but the data set has 6"):
        make_transformer(recipe, LATENTS, 6, 0, source)
    undropped = make_recipe(model=MODEL | {"class_dropout_prob": 0.0})
    make_transformer(undropped, LATENTS, 5, 0).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="trained without dropping classes"):
        make_transformer(dataclasses.replace(recipe, guidance_free=True), LATENTS, 5, 0, str(tmp_path))


def test_a_transformer_saved_in_low_precision_is_finetuned_in_float32(trained, tmp_path):
    original = SiTTransformer1DModel.from_pretrained(trained["sit"], subfolder="transformer")
    original.to(torch.bfloat16).save_pretrained(tmp_path / "transformer")
    transformer = make_transformer(SiTRecipe(finetuning=True, guidance_free=True), LATENTS, 5, 0, str(tmp_path))
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize("finetuning", [False, True])
def test_pipeline_to_start_from_belongs_to_finetuning(trained, finetuning):
    source = None if finetuning else str(trained["sit"])
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path`.*`finetuning` is {finetuning}"):
        make_transformer(SiTRecipe(finetuning=finetuning), LATENTS, 5, 0, source)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_step_of_everything_at_once(name, tmp_path):
    recipe = make_recipe(
        architecture=name,
        resolution=64,
        time_density="lognormal",
        direction_weight=1.0,
        guidance_free=True,
        alignment_weight=0.5,
        alignment_layer=2,
        alignment_hidden_size=8,
        alignment_model=save_networks(tmp_path)["dinov2_model"],
        alignment_dtype="float32",
    )
    transformer = make_transformer(recipe, LATENTS, 5, seed=0)
    objective = make_flow_objective(recipe, transformer, patch_size=16, seed=0).train()
    draws = sample_flow_draws(0, 0, range(2), LATENTS, recipe.time_density, 0.1, guidance_free=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    latents = torch.randn(2, *LATENTS, generator=generator)
    optimizer = recipe.make_optimizer(objective)
    losses = []
    for _ in range(3):
        output = objective(latents, torch.tensor([1, 2]), *draws, images)
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output)
    assert losses[0].keys() == {"loss", "loss_per_image", "velocity", "direction", "alignment"}
    assert losses[2]["loss"] < losses[0]["loss"] and losses[2]["alignment"] < losses[0]["alignment"]
    first = losses[0]
    total = first["velocity"] + 1.0 * first["direction"] + 0.5 * first["alignment"]
    assert first["loss"].item() == pytest.approx(total.item(), abs=1e-5)


def test_alignment_that_cannot_share_out_the_patches_is_refused_before_its_model_is_loaded():
    recipe = make_recipe(alignment_weight=0.5, resolution=48, alignment_model="nowhere")
    transformer = make_transformer(recipe, LATENTS, 5, seed=0)
    with pytest.raises(ValueError, match="9 patches are no multiple of 4 tokens"):
        make_flow_objective(recipe, transformer, patch_size=16, seed=0)


def test_projector_depends_on_the_seed_and_not_on_what_was_made_before(tmp_path):
    source = save_networks(tmp_path)["dinov2_model"]
    recipe = make_recipe(alignment_weight=0.5, alignment_layer=1, resolution=32, alignment_model=source)
    transformer = make_transformer(recipe, LATENTS, 5, seed=0)
    weights = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(weights))
        objective = make_flow_objective(recipe, transformer, patch_size=16, seed=seed)
        weights.append(objective.alignment.projector[0].weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
