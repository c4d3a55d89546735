"""Configs from the authors' format and back: the weights decide, and every entry that is read is checked."""

import json

import pytest
from safetensors.torch import load_file

from maetok_hf import AutoencoderMAE, convert_autoencoder, convert_transformer
from maetok_hf.conversion.configs import (
    autoencoder_config,
    revert_autoencoder_config,
    revert_transformer_config,
    transformer_config,
)
from tests.testing_utils import GOLDEN, tiny_autoencoder, tiny_transformer


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]


def load(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return config, load_file(GOLDEN / name / "model.safetensors")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_config_is_read_from_config_and_weights(name):
    config, state_dict = load(name)
    ours = autoencoder_config(config, state_dict)
    assert {key: ours[key] for key in ("hidden_size", "decoder_hidden_size")} == {
        "hidden_size": 128,
        "decoder_hidden_size": 128,
    }
    assert ours["num_layers"] == ours["decoder_num_layers"] == 2
    assert ours["num_attention_heads"] == ours["decoder_num_attention_heads"] == 2
    assert ours["mlp_ratio"] == ours["decoder_mlp_ratio"] == 4.0
    assert ours["sample_size"] == (96 if name.endswith("base_size") else 64)
    assert (ours["patch_size"], ours["latent_channels"], ours["num_latent_tokens"]) == (16, 8, 8)
    assert ours["position_embedding"] == ("absolute" if name.endswith("ape") else "rope")
    assert ours["modulated_decoder"] == name.endswith("modulated")
    assert ours["decoder_class_token"] == (name in ("tokenizer_ape", "tokenizer_rope"))
    assert (ours["latents_mean"], ours["latents_std"], ours["rope_theta"]) == (0.0123, 1.234, 10.0)
    assert ours["decoder_drop_path_rate"] == 0.0
    assert autoencoder_config({**config, "dec_drop_path_rate": 0.05}, state_dict)["decoder_drop_path_rate"] == 0.05
    AutoencoderMAE(**ours)


def test_transformer_config_is_read_from_config_and_weights():
    ours = transformer_config(*load("sit"))
    assert ours == {
        "sample_size": 8,
        "in_channels": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "mlp_ratio": 4.0,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
        "path": "linear",
    }


def test_misleading_config_entries_are_not_believed():
    """The configs name ViT-Base, a codebook, no absolute positions: the weights decide."""
    config, state_dict = load("tokenizer_rope")
    expected = autoencoder_config(config, state_dict)
    misleading = {"use_ape", "codebook_size", "z_channels", "encoder_ch_mult", "tau", "use_cfg", "enc_pretrained"}
    changed = {**config, **dict.fromkeys(misleading, "anything"), "encoder_model": "vit_giant"}
    assert autoencoder_config(changed, state_dict) == expected
    assert autoencoder_config({**config, "decoder_model": "vit_base_movq"}, state_dict)["modulated_decoder"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image_size": None}, "`image_size` = None, expected a value of type int"),
        ({"image_size": 64.0}, "`image_size` = 64.0"),
        ({"image_size": True}, "`image_size` = True"),
        ({"image_size": 60}, "`image_size` = 60, not a positive multiple of 16"),
        ({"image_size": -64}, "`image_size` = -64"),
        ({"num_latent_tokens": "8"}, "`num_latent_tokens` = '8'"),
        ({"codebook_embed_dim": 9}, "`codebook_embed_dim` = 9.*8 channels"),
        ({"enc_patch_size": 8}, "`enc_patch_size` = 8.*side 16"),
        ({"dec_patch_size": 8}, "`dec_patch_size` = 8.*side 16"),
        ({"rope_mixed": False}, "`use_rope` without `rope_mixed`"),
        ({"use_rope": "yes"}, "`use_rope` = 'yes'"),
        ({"use_rope": 1}, "`use_rope` = 1"),
        ({"rope_theta": "10"}, "`rope_theta` = '10'"),
        ({"decoder_model": 5}, "`decoder_model` = 5"),
        ({"dec_cls_token": "true"}, "`dec_cls_token` = 'true'"),
        ({"vq_mean": "0"}, "`vq_mean` = '0'"),
        ({"vq_std": [1.0]}, r"`vq_std` = \[1.0\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_tokenizer_config_entries_are_refused(entry, message):
    config, state_dict = load("tokenizer_rope")
    with pytest.raises(ValueError, match=message):
        autoencoder_config({**config, **entry}, state_dict)


@pytest.mark.parametrize(
    "key", ["image_size", "num_latent_tokens", "codebook_embed_dim", "enc_patch_size", "dec_patch_size"]
)
def test_missing_tokenizer_config_entries_are_refused(key):
    config, state_dict = load("tokenizer_rope")
    del config[key]
    with pytest.raises(ValueError, match=f"`{key}`"):
        autoencoder_config(config, state_dict)


def test_missing_statistics_stay_missing():
    config, state_dict = load("tokenizer_rope")
    del config["vq_mean"], config["vq_std"]
    ours = autoencoder_config(config, state_dict)
    assert ours["latents_mean"] is None and ours["latents_std"] is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_heads": 3}, "`num_heads` = 3, which does not divide the width 128"),
        ({"num_heads": 0}, "`num_heads` = 0"),
        ({"num_heads": "2"}, "`num_heads` = '2'"),
        ({"num_classes": 999}, "`num_classes` = 999.*1001 rows"),
        ({"num_classes": None}, "`num_classes` = None"),
        ({"qk_norm": True}, "`qk_norm`"),
        ({"patch_size": 2}, "`patch_size` = 2"),
        ({"class_dropout_prob": "0.1"}, "`class_dropout_prob` = '0.1'"),
        ({"path_type": 3}, "`path_type` = 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_transformer_config_entries_are_refused(entry, message):
    config, state_dict = load("sit")
    with pytest.raises(ValueError, match=message):
        transformer_config({**config, **entry}, state_dict)


# And back


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_configs_come_back(name):
    theirs, weights = load(name)
    back = revert_autoencoder_config(convert_autoencoder(GOLDEN / name).config)
    form = "movq" in theirs["decoder_model"]
    assert ("movq" in back["decoder_model"]) == form
    assert {**back, "decoder_model": theirs["decoder_model"]} == {key: theirs[key] for key in back}
    assert autoencoder_config(back, weights) == autoencoder_config(theirs, weights)


def test_transformer_configs_come_back():
    theirs, weights = load("sit")
    back = revert_transformer_config(convert_transformer(GOLDEN / "sit").config)
    assert back == {key: theirs[key] for key in back}
    assert transformer_config(back, weights) == transformer_config(theirs, weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64, "num_attention_heads": 2}, "heads of 64 channels only: `hidden_size` is 64"),
        ({"decoder_hidden_size": 128, "decoder_num_attention_heads": 4}, "`decoder_hidden_size` is 128"),
        ({"gaussian_posterior": True}, "`gaussian_posterior=True`"),
        ({"encoder_class_token": False}, "`encoder_class_token=False`"),
        ({"latents_mean": [0.0] * 4}, "`latents_mean` has one for each"),
    ],
)
def test_tokenizers_that_the_authors_code_cannot_build_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        revert_autoencoder_config(tiny_autoencoder(**({"hidden_size": 64, "num_attention_heads": 1} | changes)).config)


def test_transformers_that_the_authors_code_cannot_build_are_refused():
    with pytest.raises(ValueError, match="`temperature_embedding=True`"):
        revert_transformer_config(tiny_transformer(temperature_embedding=True).config)
