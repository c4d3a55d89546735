"""The yardstick of conversions is right: it gives the outputs of the authors' code."""

import json

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf.conversion.reference import reference_decode, reference_encode, reference_velocity
from maetok_hf.conversion.state_dict import revert_autoencoder_state_dict
from tests.testing_utils import GOLDEN, seeded_normal, tiny_autoencoder


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]


def load(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return load_file(GOLDEN / name / "model.safetensors"), config, load_file(GOLDEN / name / "io.safetensors")


def assert_equal(actual, expected):
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_give_the_latents_and_images_of_the_authors_code(name):
    weights, config, golden = load(name)
    assert_equal(reference_encode(weights, config, golden["image"]), golden["latent"])
    assert_equal(reference_decode(weights, config, golden["latent"]), golden["reconstruction"])


def test_transformers_give_the_velocities_of_the_authors_code():
    weights, config, golden = load("sit")
    inputs = golden["sample"], golden["timestep"]
    assert_equal(reference_velocity(weights, config, *inputs, golden["class_labels"]), golden["velocity"])
    null = torch.full_like(golden["class_labels"], config["num_classes"])
    assert_equal(reference_velocity(weights, config, *inputs, null), golden["velocity_null_class"])


@torch.no_grad()
def test_image_tokens_are_those_of_our_model():
    """No outputs of the authors' code are at hand for this form; the model is the other opinion."""
    model = tiny_autoencoder(num_latent_tokens=0, hidden_size=64, num_attention_heads=1)
    weights = revert_autoencoder_state_dict(model.state_dict())
    config = {"image_size": 32, "enc_patch_size": 8, "dec_patch_size": 8, "num_latent_tokens": 0, "use_rope": True}
    image = seeded_normal(2, 3, 32, 32)
    latent = reference_encode(weights, config, image)
    assert_equal(latent, model.encode(image).latent)
    assert_equal(reference_decode(weights, config, latent), model.decode(latent.float()).sample)
