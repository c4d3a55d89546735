"""Configs of the authors' checkpoints to configs of this library's models, and back.

Configs come from strangers: every entry that is read has its type and range checked, and every size is compared with
the weights before a model of that size is built. Pure functions of dictionaries.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from .state_dict import _count_blocks, _shape


HEAD_DIM = 64  # of every ViT in the authors' tokenizers; widths and depths are read from the weights
# what the authors' code looks for in the name of a decoder, and the names that it has for the two forms
_MODULATED = "movq"
_DECODER_MODELS = {False: "vit_base_patch14_dinov2.lvd142m", True: "vit_base_patch14_dinov2_movqv2"}
_LARGEST = 2**31 - 1


def _entry(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """An entry of the type `bool`, `str`, `int` or `float`; numbers are finite and no larger than a size can be."""
    if default is None and key not in config:
        raise ValueError(
            f"the config has no `{key}`: it is not in the authors' format, or belongs to another kind of model."
        )
    value = config.get(key, default)
    if kind in (bool, str):
        ok = isinstance(value, kind)
    else:
        ok = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not ok:
        raise ValueError(f"the authors' config has `{key}` = {value!r}, expected a value of type {kind.__name__}.")
    if kind in (int, float) and not abs(value) <= _LARGEST:  # false for what is not a number
        shown = f"a number of {len(str(abs(value)))} digits" if isinstance(value, int) else value
        raise ValueError(f"the authors' config has `{key}` = {shown}, expected a finite number up to {_LARGEST}.")
    return float(value) if kind is float else value


def _positive(config: Mapping[str, Any], key: str, default: Any = None) -> int:
    value = _entry(config, key, int, default)
    if value <= 0:
        raise ValueError(f"the authors' config has `{key}` = {value}, expected a positive number.")
    return value


def _statistic(config: Mapping[str, Any], key: str) -> float | None:
    # absent from some training checkpoints: the model then says so where they are needed
    return None if config.get(key) is None else _entry(config, key, float)


def read_autoencoder_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The entries of an authors' tokenizer config that mean something, checked as far as that is possible without the
    weights.

    Args:
        config (`Mapping`): The authors' `config.json`.

    Returns:
        `dict`: These entries, under the authors' names.

    Raises:
        ValueError: If one has an unexpected type or value, or is missing.
    """
    entries = {
        "image_size": _positive(config, "image_size"),
        "num_latent_tokens": _entry(config, "num_latent_tokens", int),
        "codebook_embed_dim": _positive(config, "codebook_embed_dim"),
        "enc_patch_size": _positive(config, "enc_patch_size"),
        "dec_patch_size": _positive(config, "dec_patch_size"),
        "use_rope": _entry(config, "use_rope", bool, False),
        "rope_theta": _entry(config, "rope_theta", float, 10.0),
        "decoder_model": _entry(config, "decoder_model", str, ""),
        "dec_cls_token": _entry(config, "dec_cls_token", bool, True),
        "dec_drop_path_rate": _entry(config, "dec_drop_path_rate", float, 0.0),
        "vq_mean": _statistic(config, "vq_mean"),
        "vq_std": _statistic(config, "vq_std"),
    }
    if entries["use_rope"] and not _entry(config, "rope_mixed", bool, False):
        raise ValueError(
            "the config has `use_rope` without `rope_mixed`: that form never worked in the authors' code, so no "
            "checkpoint can be converted faithfully."
        )
    if entries["num_latent_tokens"] < 0:
        raise ValueError(
            f"the authors' config has `num_latent_tokens` = {entries['num_latent_tokens']}, expected 0 or more."
        )
    if entries["vq_std"] is not None and entries["vq_std"] <= 0:
        raise ValueError(f"the authors' config has `vq_std` = {entries['vq_std']}, expected a positive number.")
    return entries


def _check_table(what: str, key: str, expected: int, state_dict: Mapping[str, torch.Tensor], table: str) -> None:
    """Compare a size of the config with a table of the weights, `(1, size, width)`, if that is there."""
    if table in state_dict and state_dict[table].ndim == 3 and state_dict[table].shape[1] != expected:
        raise ValueError(
            f"the sizes of config and weights do not fit: `{key}` = {what} asks for {expected} entries of `{table}`, "
            f"which has {state_dict[table].shape[1]}."
        )


def autoencoder_config(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    The [`AutoencoderMAE`] config of an authors' tokenizer.

    Args:
        config (`Mapping`): The authors' `config.json`.
        state_dict (`Mapping[str, torch.Tensor]`): Their weights, from which widths and depths are read.

    Returns:
        `dict`: Keyword arguments of [`AutoencoderMAE`].

    Raises:
        ValueError: If an entry has an unexpected type or value, or contradicts the weights.
    """
    width, in_channels, patch_size, patch_width = _shape(state_dict, "encoder.model.patch_embed.proj.weight", 4)
    if patch_width != patch_size:
        raise ValueError(f"the patch embedding's patches are {patch_size} x {patch_width} pixels: not square.")
    decoder_width, latent_channels = _shape(state_dict, "post_quant_conv.weight")
    entries = read_autoencoder_entries(config)
    image_size, num_latent_tokens = entries["image_size"], entries["num_latent_tokens"]
    for key in ("enc_patch_size", "dec_patch_size"):
        if entries[key] != patch_size:
            raise ValueError(
                f"the config has `{key}` = {entries[key]}, but the patch embedding has side {patch_size}."
            )
    if entries["codebook_embed_dim"] != latent_channels:
        raise ValueError(
            f"the config has `codebook_embed_dim` = {entries['codebook_embed_dim']}, but the decoder takes "
            f"{latent_channels} channels."
        )
    if image_size % patch_size != 0:
        raise ValueError(f"the config has `image_size` = {image_size}, not a positive multiple of {patch_size}.")
    for name, size in (("encoder", width), ("decoder", decoder_width)):
        if size % HEAD_DIM != 0:
            raise ValueError(f"the {name}'s width {size} is not a multiple of the head size {HEAD_DIM}.")
    positions = (image_size // patch_size) ** 2 + 1  # and the class token's
    _check_table(image_size, "image_size", positions, state_dict, "encoder.model.pos_embed")
    if num_latent_tokens > 0:
        for table in ("encoder.latent_tokens", "encoder.latent_pos_embed", "decoder.latent_pos_embed"):
            _check_table(num_latent_tokens, "num_latent_tokens", num_latent_tokens, state_dict, table)

    return {
        "sample_size": image_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": _shape(state_dict, "decoder.to_pixel.model.weight")[0] // patch_size**2,
        "latent_channels": latent_channels,
        "num_latent_tokens": num_latent_tokens,
        "hidden_size": width,
        "num_layers": _count_blocks(state_dict, "encoder.model."),
        "num_attention_heads": width // HEAD_DIM,
        "mlp_ratio": _shape(state_dict, "encoder.model.blocks.0.mlp.fc1.weight")[0] / width,
        "decoder_hidden_size": decoder_width,
        "decoder_num_layers": _count_blocks(state_dict, "decoder.model."),
        "decoder_num_attention_heads": decoder_width // HEAD_DIM,
        "decoder_mlp_ratio": _shape(state_dict, "decoder.model.blocks.0.mlp.fc1.weight")[0] / decoder_width,
        "position_embedding": "rope" if entries["use_rope"] else "absolute",
        "rope_theta": entries["rope_theta"],
        "modulated_decoder": _MODULATED in entries["decoder_model"],
        "decoder_class_token": entries["dec_cls_token"],
        # without effect at inference, for those who train on
        "decoder_drop_path_rate": entries["dec_drop_path_rate"],
        "latents_mean": entries["vq_mean"],
        "latents_std": entries["vq_std"],
    }


def revert_autoencoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The config of an [`AutoencoderMAE`] in the authors' format: the inverse of [`autoencoder_config`] on the entries
    that mean something. Of the name of the decoder only its form survives.

    Args:
        config (`Mapping`): Config of an [`AutoencoderMAE`].

    Returns:
        `dict`: Entries of the authors' `config.json`.

    Raises:
        ValueError: If the authors' code has no such model: with a Gaussian posterior, other heads than of 64 channels,
            statistics by channel, or without the encoder's class token.
    """
    for width, heads in (
        ("hidden_size", "num_attention_heads"),
        ("decoder_hidden_size", "decoder_num_attention_heads"),
    ):
        size = config[width] or config["hidden_size"]
        if size != HEAD_DIM * (config[heads] or config["num_attention_heads"]):
            raise ValueError(f"the authors' code has heads of {HEAD_DIM} channels only: `{width}` is {size}.")
    if config["gaussian_posterior"] or not config["encoder_class_token"]:
        raise ValueError(
            "the authors' code has no model with `gaussian_posterior=True` or `encoder_class_token=False`."
        )
    for name in ("latents_mean", "latents_std"):
        if isinstance(config[name], (list, tuple)):
            raise ValueError(f"the authors' config has one number for all channels, but `{name}` has one for each.")
    return {
        "image_size": config["sample_size"],
        "num_latent_tokens": config["num_latent_tokens"],
        "codebook_embed_dim": config["latent_channels"],
        "enc_patch_size": config["patch_size"],
        "dec_patch_size": config["patch_size"],
        "use_rope": config["position_embedding"] == "rope",
        "rope_mixed": config["position_embedding"] == "rope",
        "rope_theta": config["rope_theta"],
        "decoder_model": _DECODER_MODELS[config["modulated_decoder"]],
        "dec_cls_token": config["decoder_class_token"],
        "dec_drop_path_rate": config["decoder_drop_path_rate"],
        "vq_mean": config["latents_mean"],
        "vq_std": config["latents_std"],
    }


def read_transformer_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The entries of an authors' SiT config that mean something, checked as far as that is possible without the weights.

    Args:
        config (`Mapping`): The authors' `config.json`.

    Returns:
        `dict`: These entries, under the authors' names; sizes that the weights give as well only if they are there.

    Raises:
        ValueError: If one has an unexpected type or value, or is missing.
    """
    entries: dict[str, Any] = {
        "num_heads": _positive(config, "num_heads"),
        "num_classes": _positive(config, "num_classes"),
        "class_dropout_prob": _entry(config, "class_dropout_prob", float, 0.1),
        "path_type": _entry(config, "path_type", str, "linear").lower(),
    }
    for key in ("hidden_size", "depth", "in_channels", "input_size"):
        if key in config:
            entries[key] = _positive(config, key)
    if "mlp_ratio" in config:
        entries["mlp_ratio"] = _entry(config, "mlp_ratio", float)
    if _entry(config, "qk_norm", bool, False):
        raise ValueError("the config has `qk_norm` = true, which the published SiT models do not use: not supported.")
    if _entry(config, "patch_size", int, 1) != 1:
        raise ValueError(f"the config has `patch_size` = {config['patch_size']}: on 1D latents it must be 1.")
    if entries["path_type"] not in ("linear", "cosine"):
        raise ValueError(f"the config has `path_type` = {config['path_type']!r}, expected 'linear' or 'cosine'.")
    if not 0 <= entries["class_dropout_prob"] <= 1:
        raise ValueError(f"the config has `class_dropout_prob` = {config['class_dropout_prob']}, not in [0, 1].")
    return entries


def transformer_config(config: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """
    The [`SiTTransformer1DModel`] config of an authors' SiT.

    Args:
        config (`Mapping`): The authors' `config.json`.
        state_dict (`Mapping[str, torch.Tensor]`): Their weights.

    Returns:
        `dict`: Keyword arguments of [`SiTTransformer1DModel`].

    Raises:
        ValueError: If an entry has an unexpected type or value, or contradicts the weights.
    """
    width, in_channels = _shape(state_dict, "x_embedder.weight")
    _, sample_size, _ = _shape(state_dict, "pos_embed", 3)
    entries = read_transformer_entries(config)
    num_heads, num_classes = entries["num_heads"], entries["num_classes"]
    if width % num_heads != 0:
        raise ValueError(f"the config has `num_heads` = {num_heads}, which does not divide the width {width}.")
    embeddings = _shape(state_dict, "y_embedder.embedding_table.weight")[0]
    if embeddings != num_classes + 1:
        raise ValueError(
            f"the config has `num_classes` = {num_classes}, but the class table has {embeddings} rows; it must "
            "have one more than there are classes, the null class."
        )
    if _shape(state_dict, "final_layer.linear.weight")[0] != in_channels:
        raise ValueError(
            "the final layer predicts more than the velocity: models with learned variance are not SiT's."
        )
    num_layers = _count_blocks(state_dict, "")
    mlp_ratio = _shape(state_dict, "blocks.0.mlp.fc1.weight")[0] / width
    sizes = {
        "hidden_size": width,
        "depth": num_layers,
        "in_channels": in_channels,
        "input_size": sample_size,
        "mlp_ratio": mlp_ratio,
    }
    for key, size in sizes.items():
        if key in entries and not math.isclose(entries[key], size, rel_tol=1e-6):
            raise ValueError(
                f"the sizes of config and weights do not fit: the config has `{key}` = {entries[key]}, the weights "
                f"have {size}."
            )
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "mlp_ratio": mlp_ratio,
        "num_classes": num_classes,
        "class_dropout_prob": entries["class_dropout_prob"],
        "path": entries["path_type"],
    }


def revert_transformer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    The config of a [`SiTTransformer1DModel`] in the authors' format: the inverse of [`transformer_config`].

    Args:
        config (`Mapping`): Config of a [`SiTTransformer1DModel`].

    Returns:
        `dict`: Entries of the authors' `config.json`.

    Raises:
        ValueError: If the model has a temperature embedding, which the authors' code does not have.
    """
    if config["temperature_embedding"]:
        raise ValueError("the authors' code has no model with `temperature_embedding=True`.")
    return {
        "input_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "depth": config["num_layers"],
        "hidden_size": config["num_attention_heads"] * config["attention_head_dim"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "num_classes": config["num_classes"],
        "class_dropout_prob": config["class_dropout_prob"],
        "path_type": config["path"],
        "patch_size": 1,
        "qk_norm": False,
    }
