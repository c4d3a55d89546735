"""A conversion that went wrong is noticed, whatever went wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf.conversion import (
    ConversionError,
    convert_autoencoder,
    convert_transformer,
    verify_autoencoder,
    verify_transformer,
)
from maetok_hf.conversion import state_dict as tables
from tests.testing_utils import GOLDEN


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]


def load(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return config, load_file(GOLDEN / name / "model.safetensors")


def rounded(model, dtype):
    """As a model comes back that was stored in another dtype, all but its rotary frequencies."""
    dtypes = {}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            dtypes[name] = torch.float32 if name.endswith("freqs") else dtype
            tensor.copy_(tensor.to(dtypes[name]))
    return model, dtypes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_right_tokenizers_pass(name):
    config, weights = load(name)
    result = verify_autoencoder(convert_autoencoder(GOLDEN / name), config, weights)
    assert result.num_tensors + len(result.left_out) == len(weights)
    assert {"encoder.freqs_t_x", "decoder.model.patch_embed.proj.weight"} & set(result.left_out)
    assert result.differences.keys() == {"latents", "images"} and max(result.differences.values()) < 1e-5


def test_right_transformers_pass():
    config, weights = load("sit")
    result = verify_transformer(convert_transformer(GOLDEN / "sit"), config, weights)
    assert (result.num_tensors, result.left_out) == (len(weights), [])
    assert result.differences.keys() == {"velocities"} and max(result.differences.values()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_low_precision_are_the_rounded_weights(dtype):
    config, weights = load("tokenizer_rope_modulated")
    model, dtypes = rounded(convert_autoencoder(GOLDEN / "tokenizer_rope_modulated"), dtype)
    assert max(verify_autoencoder(model, config, weights, dtypes).differences.values()) < 1e-5
    if dtype == torch.bfloat16:  # in which the golden weights are not exact
        with pytest.raises(ConversionError, match="the way back to the authors' format changes"):
            verify_autoencoder(model, config, weights)


def test_every_tensor_is_looked_at():
    config, weights = load("tokenizer_rope")
    model = convert_autoencoder(GOLDEN / "tokenizer_rope")
    for parameter in model.parameters():
        original = parameter.data.clone()
        parameter.data.view(-1)[0] += 1e-3
        with pytest.raises(ConversionError, match="the way back to the authors' format changes 1 tensors"):
            verify_autoencoder(model, config, weights)
        parameter.data = original


def test_a_wrong_key_table_is_noticed_by_the_outputs(monkeypatch):
    """A table that is wrong in both directions makes the way back the identity, and the model another one."""
    config, weights = load("sit")
    monkeypatch.setattr(tables, "_QUERY_KEY_VALUE", ("attn.to_v", "attn.to_k", "attn.to_q"))
    model = convert_transformer(GOLDEN / "sit")
    with pytest.raises(ConversionError, match="the velocities of a fixed input differ .* by 0"):
        verify_transformer(model, config, weights)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_rope", {"decoder_model": "vit_base_patch14_dinov2_movqv2"}),
        ("tokenizer_rope", {"rope_theta": 100.0}),
        ("tokenizer_rope", {"vq_mean": 1.0}),
        ("tokenizer_rope", {"dec_cls_token": False}),
        ("sit", {"num_heads": 4}),
        ("sit", {"path_type": "cosine"}),
    ],
)
def test_another_config_is_noticed(name, change):
    config, weights = load(name)
    model, verify = (
        (convert_transformer(GOLDEN / name), verify_transformer)
        if name == "sit"
        else (convert_autoencoder(GOLDEN / name), verify_autoencoder)
    )
    with pytest.raises(ConversionError, match="the config is not that of the authors' checkpoint"):
        verify(model, config | change, weights)


def test_a_misread_config_is_noticed_by_the_outputs():
    """Here the model and what its config is compared with are misread alike."""
    config, weights = load("sit")
    model = convert_transformer(GOLDEN / "sit")
    for block in model.transformer_blocks:
        block.attn.heads = 4
        block.attn.head_dim = 32
    with pytest.raises(ConversionError, match="the velocities of a fixed input differ"):
        verify_transformer(model, config, weights)


def test_numbers_that_are_none_are_noticed():
    config, weights = load("sit")
    model = convert_transformer(GOLDEN / "sit")
    model.proj_out.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    with pytest.raises(ConversionError, match="by nan of their size"):
        verify_transformer(model, config, weights)
