"""Key tables and config mapping: pure functions, strict in both directions."""

import json

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel
from maetok_hf.conversion.configs import autoencoder_config, transformer_config
from maetok_hf.conversion.state_dict import (
    convert_autoencoder_state_dict,
    convert_transformer_state_dict,
    revert_autoencoder_state_dict,
    revert_transformer_state_dict,
)
from tests.testing_utils import AUTOENCODER_FORMS, GOLDEN, tiny_autoencoder, tiny_transformer


TOKENIZERS = ["tokenizer_ape", "tokenizer_rope", "tokenizer_rope_base_size", "tokenizer_rope_modulated"]
TRAINING_KEYS = [
    "encoder.freqs_t_x",
    "encoder.freqs_t_y",
    "decoder.freqs_t_x",
    "decoder.freqs_t_y",
    "decoder.model.patch_embed.proj.weight",
    "decoder.model.patch_embed.proj.bias",
    "scale",
    "de_scale",
]
TRAINING_PREFIXES = [
    "decoder_hog",
    "decoder_dino",
    "decoder_clip",
    "post_quant_conv_hog",
    "post_quant_conv_dino",
    "post_quant_conv_clip",
    "to_pixel_hog",
    "to_pixel_dino",
    "to_pixel_clip",
    "hog_generator",
    "repa_model",
    "projection",
    "clip_model",
]


def load(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return config, load_file(GOLDEN / name / "model.safetensors")


def convert(name, drop=(), **extra):
    config, state_dict = load(name)
    state_dict = {key: value for key, value in state_dict.items() if key not in drop} | extra
    if name == "sit":
        return convert_transformer_state_dict(state_dict, transformer_config(config, state_dict))
    return convert_autoencoder_state_dict(state_dict, autoencoder_config(config, state_dict))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_round_trip_is_the_identity_on_the_kept_keys(name):
    _, theirs = load(name)
    ours = convert(name)
    back = revert_autoencoder_state_dict(ours)
    dropped = set(TRAINING_KEYS)
    if name != "tokenizer_ape":
        dropped.add("decoder.model.pos_embed")
    assert set(back) == set(theirs) - dropped
    for key, value in back.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def test_transformer_round_trip_is_the_identity():
    _, theirs = load("sit")
    back = revert_transformer_state_dict(convert("sit"))
    assert set(back) == set(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in back.items())


@pytest.mark.parametrize("form", AUTOENCODER_FORMS.values(), ids=AUTOENCODER_FORMS.keys())
def test_our_tokenizers_round_trip_through_the_authors_names(form):
    """From our side: every parameter of every form has a name there, and comes back from it."""
    model = tiny_autoencoder(**{**form, "encoder_class_token": True})  # the authors' encoder always has one
    theirs = revert_autoencoder_state_dict(model.state_dict())
    config = {**model.config, "decoder_num_layers": len(model.decoder.transformer_blocks)}
    ours = convert_autoencoder_state_dict(theirs, config)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_our_transformer_round_trips_through_the_authors_names():
    model = tiny_transformer()
    ours = convert_transformer_state_dict(revert_transformer_state_dict(model.state_dict()), model.config)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_fused_projections_are_split_in_the_order_query_key_value():
    _, theirs = load("tokenizer_rope")
    ours = convert("tokenizer_rope")
    fused = theirs["decoder.model.blocks.1.attn.qkv.weight"]
    for i, part in enumerate(("to_q", "to_k", "to_v")):
        assert torch.equal(
            ours[f"decoder.transformer_blocks.1.attn.{part}.weight"], fused[128 * i : 128 * i + 128]
        )  # fmt: skip


# Strictness


@pytest.mark.parametrize("name", [*TOKENIZERS, "sit"])
def test_every_kept_key_is_required(name):
    _, theirs = load(name)
    kept = (revert_transformer_state_dict if name == "sit" else revert_autoencoder_state_dict)(convert(name))
    for key in kept:
        with pytest.raises(ValueError, match=rf"`?{key}`?"):
            convert(name, drop={key})
    assert set(kept) <= set(theirs)


@pytest.mark.parametrize("name", [*TOKENIZERS, "sit"])
@pytest.mark.parametrize(
    "key",
    [
        "extra",
        "encoder.model.head.weight",
        "encoder.model.blocks.0.attn.q_norm.weight",
        "quantize.embedding.weight",
        "module.encoder.mask_token",
        "scale.weight",
        "encoder.freqs_t_z",
        "decoder_hogs.weight",
        "decoder_hog",
        "my_projection.weight",
        "clip_model2.weight",
        "to_pixel.weight",
    ],
)
def test_unknown_keys_are_refused(name, key):
    with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]"):
        convert(name, **{key: torch.zeros(1)})


def test_all_offending_keys_are_listed_at_once():
    extra = {"first": torch.ones(1), "last": torch.ones(1)}
    with pytest.raises(ValueError) as error:
        convert("tokenizer_rope", drop={"encoder.mask_token", "decoder.mask_token"}, **extra)
    assert "missing keys ['decoder.mask_token', 'encoder.mask_token']" in str(error.value)
    assert "unknown keys ['first', 'last']" in str(error.value)


@pytest.mark.parametrize("prefix", TRAINING_PREFIXES)
@pytest.mark.parametrize("name", ["tokenizer_rope_modulated", "tokenizer_ape"])
def test_training_only_prefixes_are_dropped(name, prefix):
    extra = {f"{prefix}.weight": torch.zeros(1), f"{prefix}.model.blocks.0.attn.qkv.weight": torch.zeros(3)}
    assert convert(name, **extra).keys() == convert(name).keys()


@pytest.mark.parametrize("key", [*TRAINING_KEYS, *(f"{prefix}.weight" for prefix in TRAINING_PREFIXES)])
def test_transformers_have_no_training_only_keys(key):
    with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]"):
        convert("sit", **{key: torch.zeros(1)})


@pytest.mark.parametrize("key", TRAINING_KEYS)
def test_training_only_keys_are_dropped_and_not_required(key):
    for name in ("tokenizer_rope", "tokenizer_ape"):
        expected = convert(name).keys()
        assert convert(name, drop={key}).keys() == expected
        assert convert(name, **{key: torch.zeros(5)}).keys() == expected


def test_forms_decide_which_tables_are_dropped():
    table, token = torch.zeros(1, 17, 128), torch.zeros(1, 1, 128)
    # with rotary positions the decoder's table is not used; without them it is required
    convert("tokenizer_rope", **{"decoder.model.pos_embed": table})
    with pytest.raises(ValueError, match=r"missing keys \['decoder.model.pos_embed'\]"):
        convert("tokenizer_ape", drop={"decoder.model.pos_embed"})
    # a decoder without class token may have stored one
    convert("tokenizer_rope_modulated", **{"decoder.model.cls_token": token})
    # what contradicts the form is unknown
    for name, key in (
        ("tokenizer_ape", "encoder.freqs"),
        ("tokenizer_rope", "decoder.model.norm.adaLN_modulation.1.bias"),
        ("tokenizer_rope", "decoder.model.blocks.0.adaLN_modulation.1.weight"),
        ("tokenizer_rope_modulated", "decoder.model.blocks.0.ls1.gamma"),
        ("tokenizer_rope_modulated", "decoder.model.norm.weight"),
    ):
        with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]"):
            convert(name, **{key: torch.zeros(4)})


def test_absolute_decoder_without_class_token_drops_the_class_entry():
    config, state_dict = load("tokenizer_ape")
    del state_dict["decoder.model.cls_token"]
    ours = convert_autoencoder_state_dict(
        state_dict, autoencoder_config({**config, "dec_cls_token": False}, state_dict)
    )  # fmt: skip
    assert "decoder.class_token" not in ours
    assert torch.equal(ours["decoder.pos_embed"], state_dict["decoder.model.pos_embed"][:, 1:])
    # only the class entry: a table of another size is left for the shape check to refuse
    state_dict["decoder.model.pos_embed"] = torch.zeros(1, 33, 128)
    ours = convert_autoencoder_state_dict(
        state_dict, autoencoder_config({**config, "dec_cls_token": False}, state_dict)
    )  # fmt: skip
    assert ours["decoder.pos_embed"].shape == (1, 33, 128)


def test_image_token_checkpoints_hold_no_latent_tokens():
    config, state_dict = load("tokenizer_rope")
    config["num_latent_tokens"] = 0
    tables = ["encoder.latent_tokens", "encoder.latent_pos_embed", "decoder.latent_pos_embed"]
    with pytest.raises(ValueError, match=r"unknown keys \['decoder.latent_pos_embed'"):
        convert_autoencoder_state_dict(state_dict, autoencoder_config(config, state_dict))
    for tensors in ({}, {key: torch.zeros(1, 0, 128) for key in tables}):
        stripped = {key: value for key, value in state_dict.items() if key not in tables} | tensors
        ours_config = autoencoder_config(config, stripped)
        ours = convert_autoencoder_state_dict(stripped, ours_config)
        with torch.device("meta"):
            assert ours.keys() == AutoencoderMAE(**ours_config).state_dict().keys()


@pytest.mark.parametrize(
    ("name", "key", "tensor", "message"),
    [
        ("tokenizer_rope", "encoder.model.patch_embed.proj.weight", torch.zeros(128, 3), "expected 4 dimensions"),
        ("tokenizer_rope", "encoder.model.patch_embed.proj.weight", torch.zeros(128, 3, 16, 8), "not square"),
        ("tokenizer_rope", "encoder.model.patch_embed.proj.weight", torch.zeros(100, 3, 16, 16), "head size 64"),
        ("tokenizer_rope", "post_quant_conv.weight", torch.zeros(128), "expected 2 dimensions"),
        ("tokenizer_rope", "post_quant_conv.weight", torch.zeros(0, 8), "expected 2 dimensions"),
        ("tokenizer_rope", "encoder.model.blocks.0.attn.qkv.weight", torch.zeros(128, 128), "query, key and value"),
        ("tokenizer_rope", "decoder.model.blocks.1.attn.qkv.bias", torch.zeros(()), "query, key and value"),
        ("sit", "pos_embed", torch.zeros(8, 128), "expected 3 dimensions"),
        ("sit", "final_layer.linear.weight", torch.zeros(16, 128), "more than the velocity"),
        ("sit", "blocks.0.attn.qkv.bias", torch.zeros(1), "query, key and value"),
    ],
)
def test_impossible_shapes_are_explained(name, key, tensor, message):
    with pytest.raises(ValueError, match=message):
        convert(name, **{key: tensor})


def test_blocks_must_be_numbered_without_gaps():
    config, state_dict = load("sit")
    renamed = {key.replace("blocks.1.", "blocks.2."): value for key, value in state_dict.items()}
    with pytest.raises(ValueError, match=r"missing keys \['blocks\.1\..*unknown keys \['blocks\.2\."):
        convert_transformer_state_dict(renamed, transformer_config(config, renamed))


@pytest.mark.parametrize("key", ["encoder.model.blocks.2.attn.proj.weight", "decoder.model.blocks.9.norm1.bias"])
def test_a_stray_block_lacks_its_other_keys(key):
    with pytest.raises(ValueError, match=r"missing keys \['(encoder|decoder)\.model\.blocks\.2"):
        convert("tokenizer_rope", **{key: torch.zeros(128)})


def test_the_wrong_kind_of_checkpoint_is_refused():
    config, state_dict = load("sit")
    with pytest.raises(
        ValueError, match="no `encoder.model.patch_embed.proj.weight`: it is not in the authors' format"
    ):
        autoencoder_config(config, state_dict)
    config, state_dict = load("tokenizer_rope")
    with pytest.raises(ValueError, match="no `x_embedder.weight`"):
        transformer_config(config, state_dict)
    with pytest.raises(ValueError, match="not in the authors' format"):
        autoencoder_config(config, {})


@pytest.mark.parametrize(
    ("revert", "model"),
    [(revert_autoencoder_state_dict, tiny_autoencoder), (revert_transformer_state_dict, tiny_transformer)],
)
def test_reverting_is_strict(revert, model):
    state_dict = model().state_dict()
    with pytest.raises(ValueError, match=r"\['extra'\]"):
        revert({**state_dict, "extra": torch.zeros(1)})
    key = next(key for key in state_dict if key.endswith("to_k.weight"))
    with pytest.raises(ValueError, match=key):
        revert({name: value for name, value in state_dict.items() if name != key})


def test_converting_changes_no_argument():
    for name in ("tokenizer_rope", "sit"):
        config, state_dict = load(name)
        before = dict(config), dict(state_dict)
        if name == "sit":
            convert_transformer_state_dict(state_dict, transformer_config(config, state_dict))
        else:
            convert_autoencoder_state_dict(state_dict, autoencoder_config(config, state_dict))
        assert (config, list(state_dict)) == (before[0], list(before[1]))


def test_every_parameter_of_the_models_is_covered():
    """A parameter added to a model without a line in the key tables would stay on the meta device."""
    for name in TOKENIZERS:
        config, state_dict = load(name)
        with torch.device("meta"):
            model = AutoencoderMAE(**autoencoder_config(config, state_dict))
        assert convert(name).keys() == model.state_dict().keys()
    with torch.device("meta"):
        model = SiTTransformer1DModel(**transformer_config(*load("sit")))
    assert convert("sit").keys() == model.state_dict().keys()
