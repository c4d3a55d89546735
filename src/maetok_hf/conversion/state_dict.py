"""Key tables between the authors' checkpoints and this library's models, and the mapping of their configs.

Everything here is a pure function of dictionaries, strict in both directions: a key that the tables do not know, or
one that is missing, is an error that lists it. What the authors' training code saves next to the model is dropped by
name.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch


HEAD_DIM = 64  # of every ViT in the authors' tokenizers; widths and depths are read from the weights

# Saved by the authors' code but not part of the model at inference, by exact name or by prefix.
_DROPPED_KEYS = {
    "encoder.freqs_t_x",
    "encoder.freqs_t_y",
    "decoder.freqs_t_x",
    "decoder.freqs_t_y",
    "decoder.model.patch_embed.proj.weight",
    "decoder.model.patch_embed.proj.bias",
    "scale",
    "de_scale",
}
_DROPPED_PREFIXES = tuple(
    f"{name}."
    for name in (
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
    )
)

# (ours, the authors'): parameters outside the blocks
_AUTOENCODER_KEYS = {
    "encoder.patch_embed.weight": "encoder.model.patch_embed.proj.weight",
    "encoder.patch_embed.bias": "encoder.model.patch_embed.proj.bias",
    "encoder.class_token": "encoder.model.cls_token",
    "encoder.pos_embed": "encoder.model.pos_embed",
    "encoder.mask_token": "encoder.mask_token",
    "encoder.latent_tokens": "encoder.latent_tokens",
    "encoder.latent_pos_embed": "encoder.latent_pos_embed",
    "encoder.rope.freqs": "encoder.freqs",
    "encoder.norm.weight": "encoder.model.norm.weight",
    "encoder.norm.bias": "encoder.model.norm.bias",
    "encoder.proj_out.weight": "quant_conv.weight",
    "encoder.proj_out.bias": "quant_conv.bias",
    "decoder.proj_in.weight": "post_quant_conv.weight",
    "decoder.proj_in.bias": "post_quant_conv.bias",
    "decoder.class_token": "decoder.model.cls_token",
    "decoder.pos_embed": "decoder.model.pos_embed",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.latent_pos_embed": "decoder.latent_pos_embed",
    "decoder.rope.freqs": "decoder.freqs",
    "decoder.norm.weight": "decoder.model.norm.weight",
    "decoder.norm.bias": "decoder.model.norm.bias",
    "decoder.norm_modulation.linear.weight": "decoder.model.norm.adaLN_modulation.1.weight",
    "decoder.norm_modulation.linear.bias": "decoder.model.norm.adaLN_modulation.1.bias",
    "decoder.proj_out.weight": "decoder.to_pixel.model.weight",
    "decoder.proj_out.bias": "decoder.to_pixel.model.bias",
}
_TRANSFORMER_KEYS = {
    "pos_embed": "pos_embed",
    "proj_in.weight": "x_embedder.weight",
    "proj_in.bias": "x_embedder.bias",
    "time_embed.linear_1.weight": "t_embedder.mlp.0.weight",
    "time_embed.linear_1.bias": "t_embedder.mlp.0.bias",
    "time_embed.linear_2.weight": "t_embedder.mlp.2.weight",
    "time_embed.linear_2.bias": "t_embedder.mlp.2.bias",
    "class_embed.weight": "y_embedder.embedding_table.weight",
    "norm_out_modulation.linear.weight": "final_layer.adaLN_modulation.1.weight",
    "norm_out_modulation.linear.bias": "final_layer.adaLN_modulation.1.bias",
    "proj_out.weight": "final_layer.linear.weight",
    "proj_out.bias": "final_layer.linear.bias",
}
# inside a block; query, key and value are one matrix in the authors' models
_BLOCK_KEYS = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "modulation.linear": "adaLN_modulation.1",
}
_LAYER_SCALE_KEYS = {"scale1.gamma": "ls1.gamma", "scale2.gamma": "ls2.gamma"}
_QUERY_KEY_VALUE = ("attn.to_q", "attn.to_k", "attn.to_v")


class _Source:
    """A state dict of which every key must be taken exactly once."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        self.state_dict = dict(state_dict)
        self.missing: list[str] = []

    def take(self, key: str) -> torch.Tensor | None:
        if key not in self.state_dict:
            self.missing.append(key)
            return None
        return self.state_dict.pop(key)

    def check_used_up(self, what: str) -> None:
        if self.missing or self.state_dict:
            raise ValueError(
                f"this is not a {what} checkpoint in the authors' format that the converter knows: "
                f"missing keys {sorted(self.missing)}, unknown keys {sorted(self.state_dict)}."
            )


def _count_blocks(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
    indices = {int(match.group(1)) for key in state_dict if (match := pattern.match(key))}
    return len(indices)


def _shape(state_dict: Mapping[str, torch.Tensor], key: str, num_dims: int = 2) -> torch.Size:
    if key not in state_dict:
        raise ValueError(
            f"the checkpoint has no `{key}`: it is not in the authors' format (found {len(state_dict)} other keys)."
        )
    shape = state_dict[key].shape
    if len(shape) != num_dims or 0 in shape:
        raise ValueError(f"the checkpoint's `{key}` has shape {tuple(shape)}, expected {num_dims} dimensions.")
    return shape


def _split_qkv(fused: torch.Tensor, key: str) -> tuple[torch.Tensor, ...]:
    if fused.ndim == 0 or fused.shape[0] == 0 or fused.shape[0] % 3 != 0:
        raise ValueError(
            f"the checkpoint's `{key}` has shape {tuple(fused.shape)}, whose first dimension must hold query, key and "
            "value."
        )
    return fused.chunk(3)


def _blocks_to_ours(
    source: _Source, ours: str, theirs: str, num_layers: int, names: Mapping[str, str], layer_scale: bool
) -> dict[str, torch.Tensor | None]:
    """One stack of blocks, `names` being the (ours, theirs) pairs that have a weight and a bias."""
    result: dict[str, torch.Tensor | None] = {}
    for index in range(num_layers):
        our_block, their_block = f"{ours}transformer_blocks.{index}.", f"{theirs}blocks.{index}."
        for kind in ("weight", "bias"):
            key = f"{their_block}attn.qkv.{kind}"
            fused = source.take(key)
            parts = [None] * 3 if fused is None else _split_qkv(fused, key)
            result |= {f"{our_block}{n}.{kind}": part for n, part in zip(_QUERY_KEY_VALUE, parts, strict=True)}
            for our_name, their_name in names.items():
                result[f"{our_block}{our_name}.{kind}"] = source.take(f"{their_block}{their_name}.{kind}")
        if layer_scale:
            for our_name, their_name in _LAYER_SCALE_KEYS.items():
                result[our_block + our_name] = source.take(their_block + their_name)
    return result


def _blocks_to_authors(state_dict: dict[str, torch.Tensor], ours: str, theirs: str) -> dict[str, torch.Tensor]:
    """Take a stack of blocks out of `state_dict`, under the authors' names."""
    names = {
        **_BLOCK_KEYS,
        **{o.removesuffix(".gamma"): t.removesuffix(".gamma") for o, t in _LAYER_SCALE_KEYS.items()},
    }
    result = {}
    prefix = f"{ours}transformer_blocks."
    for key in [key for key in state_dict if key.startswith(prefix)]:
        if key not in state_dict:
            continue  # taken with its query
        index, _, name = key[len(prefix) :].partition(".")
        module, _, kind = name.rpartition(".")
        their_block = f"{theirs}blocks.{index}."
        if module in _QUERY_KEY_VALUE:
            keys = [f"{prefix}{index}.{n}.{kind}" for n in _QUERY_KEY_VALUE]
            missing = [k for k in keys if k not in state_dict]
            if missing:
                raise ValueError(f"query, key and value belong together, but there is no {missing}.")
            parts = [state_dict.pop(k) for k in keys]
            result[f"{their_block}attn.qkv.{kind}"] = torch.cat(parts)
        elif module in names:
            result[f"{their_block}{names[module]}.{kind}"] = state_dict.pop(key)
    return result


def _drop_training_only(state_dict: Mapping[str, torch.Tensor], dropped: set[str]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state_dict.items() if k not in dropped and not k.startswith(_DROPPED_PREFIXES)}


def _number(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = config.get(key, default)
    ok = isinstance(value, bool) if kind is bool else isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not ok:
        raise ValueError(f"the authors' config has `{key}` = {value!r}, expected a value of type {kind.__name__}.")
    return value


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
    image_size = _number(config, "image_size", int)
    num_latent_tokens = _number(config, "num_latent_tokens", int)
    use_rope = _number(config, "use_rope", bool, False)
    if use_rope and not _number(config, "rope_mixed", bool, False):
        raise ValueError(
            "the config has `use_rope` without `rope_mixed`: that form never worked in the authors' code, so no "
            "checkpoint can be converted faithfully."
        )
    decoder_model = config.get("decoder_model", "")
    if not isinstance(decoder_model, str):
        raise ValueError(f"the authors' config has `decoder_model` = {decoder_model!r}, expected a string.")
    for key in ("enc_patch_size", "dec_patch_size"):
        if _number(config, key, int) != patch_size:
            raise ValueError(f"the config has `{key}` = {config[key]}, but the patch embedding has side {patch_size}.")
    if _number(config, "codebook_embed_dim", int) != latent_channels:
        raise ValueError(
            f"the config has `codebook_embed_dim` = {config['codebook_embed_dim']}, but the decoder takes "
            f"{latent_channels} channels."
        )
    if image_size <= 0 or image_size % patch_size != 0:
        raise ValueError(f"the config has `image_size` = {image_size}, not a positive multiple of {patch_size}.")
    for name, size in (("encoder", width), ("decoder", decoder_width)):
        if size % HEAD_DIM != 0:
            raise ValueError(f"the {name}'s width {size} is not a multiple of the head size {HEAD_DIM}.")

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
        "position_embedding": "rope" if use_rope else "absolute",
        "rope_theta": _number(config, "rope_theta", float, 10.0),
        "modulated_decoder": "movq" in decoder_model,
        "decoder_class_token": _number(config, "dec_cls_token", bool, True),
        # without effect at inference, for those who train on
        "decoder_drop_path_rate": _number(config, "dec_drop_path_rate", float, 0.0),
        # absent from some training checkpoints: the model then says so where they are needed
        "latents_mean": None if config.get("vq_mean") is None else _number(config, "vq_mean", float),
        "latents_std": None if config.get("vq_std") is None else _number(config, "vq_std", float),
    }


def convert_autoencoder_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The authors' tokenizer weights under the names of [`AutoencoderMAE`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The authors' weights.
        config (`Mapping`): The converted config, of [`autoencoder_config`].

    Returns:
        `dict[str, torch.Tensor]`: A complete state dict.

    Raises:
        ValueError: If a key is missing or unknown; the message lists all of them.
    """
    rope, modulated = config["position_embedding"] == "rope", config["modulated_decoder"]
    dropped = set(_DROPPED_KEYS)
    absent = set()
    if rope:
        dropped.add("decoder.model.pos_embed")
        absent.add("decoder.pos_embed")
    else:
        absent |= {"encoder.rope.freqs", "decoder.rope.freqs"}
    if not config["decoder_class_token"]:
        dropped.add("decoder.model.cls_token")
        absent.add("decoder.class_token")
    if config["num_latent_tokens"] == 0:
        # image tokens as latents: no latent tokens, no mask token; a table of zero tokens may be stored, a filled one
        # contradicts the config and stays to be reported as unknown
        tables = {"encoder.latent_tokens", "encoder.latent_pos_embed", "decoder.latent_pos_embed"}
        dropped |= {key for key in tables if key in state_dict and state_dict[key].numel() == 0}
        dropped.add("decoder.mask_token")
        absent |= tables | {"decoder.mask_token"}
    if modulated:
        absent |= {"decoder.norm.weight", "decoder.norm.bias"}
    else:
        absent |= {"decoder.norm_modulation.linear.weight", "decoder.norm_modulation.linear.bias"}

    source = _Source(_drop_training_only(state_dict, dropped))
    result = {ours: source.take(theirs) for ours, theirs in _AUTOENCODER_KEYS.items() if ours not in absent}
    plain = {ours: theirs for ours, theirs in _BLOCK_KEYS.items() if ours != "modulation.linear"}
    conditioned = {ours: theirs for ours, theirs in _BLOCK_KEYS.items() if not ours.startswith("norm")}
    result |= _blocks_to_ours(source, "encoder.", "encoder.model.", config["num_layers"], plain, layer_scale=True)
    result |= _blocks_to_ours(
        source,
        "decoder.",
        "decoder.model.",
        config["decoder_num_layers"],
        conditioned if modulated else plain,
        layer_scale=not modulated,
    )
    source.check_used_up("MAETok tokenizer")
    if "decoder.pos_embed" in result and not config["decoder_class_token"]:
        # the table keeps a class entry even when the decoder has no class token
        patches = (config["sample_size"] // config["patch_size"]) ** 2
        table = result["decoder.pos_embed"]
        if table.ndim == 3 and table.shape[1] == patches + 1:
            result["decoder.pos_embed"] = table[:, 1:]
    return result


def revert_autoencoder_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    [`AutoencoderMAE`] weights under the authors' names: the inverse of [`convert_autoencoder_state_dict`] on every key
    it keeps.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): State dict of an [`AutoencoderMAE`].

    Returns:
        `dict[str, torch.Tensor]`: The authors' keys.

    Raises:
        ValueError: If a key is not one of [`AutoencoderMAE`]'s; the message lists them.
    """
    rest = dict(state_dict)
    result = _blocks_to_authors(rest, "encoder.", "encoder.model.") | _blocks_to_authors(
        rest, "decoder.", "decoder.model."
    )
    result |= {theirs: rest.pop(ours) for ours, theirs in _AUTOENCODER_KEYS.items() if ours in rest}
    if rest:
        raise ValueError(f"keys that are not AutoencoderMAE's: {sorted(rest)}.")
    return result


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
    path = config.get("path_type", "linear")
    if not isinstance(path, str):
        raise ValueError(f"the authors' config has `path_type` = {path!r}, expected a string.")
    num_heads = _number(config, "num_heads", int)
    num_classes = _number(config, "num_classes", int)
    if _number(config, "qk_norm", bool, False):
        raise ValueError("the config has `qk_norm` = true, which the published SiT models do not use: not supported.")
    if _number(config, "patch_size", int, 1) != 1:
        raise ValueError(f"the config has `patch_size` = {config['patch_size']}: on 1D latents it must be 1.")
    if num_heads <= 0 or width % num_heads != 0:
        raise ValueError(f"the config has `num_heads` = {num_heads}, which does not divide the width {width}.")
    embeddings = _shape(state_dict, "y_embedder.embedding_table.weight")[0]
    if embeddings != num_classes + 1:
        raise ValueError(
            f"the config has `num_classes` = {num_classes}, but the class table has {embeddings} rows; it must "
            f"have one "
            "more than there are classes, the null class."
        )
    if _shape(state_dict, "final_layer.linear.weight")[0] != in_channels:
        raise ValueError(
            "the final layer predicts more than the velocity: models with learned variance are not SiT's."
        )
    return {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_layers": _count_blocks(state_dict, ""),
        "num_attention_heads": num_heads,
        "attention_head_dim": width // num_heads,
        "mlp_ratio": _shape(state_dict, "blocks.0.mlp.fc1.weight")[0] / width,
        "num_classes": num_classes,
        "class_dropout_prob": _number(config, "class_dropout_prob", float, 0.1),
        "path": path.lower(),
    }


def convert_transformer_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The authors' SiT weights under the names of [`SiTTransformer1DModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The authors' weights.
        config (`Mapping`): The converted config, of [`transformer_config`].

    Returns:
        `dict[str, torch.Tensor]`: A complete state dict.

    Raises:
        ValueError: If a key is missing or unknown; the message lists all of them.
    """
    source = _Source(state_dict)  # its training code saves nothing else in it
    result = {ours: source.take(theirs) for ours, theirs in _TRANSFORMER_KEYS.items()}
    names = {ours: theirs for ours, theirs in _BLOCK_KEYS.items() if not ours.startswith("norm")}
    result |= _blocks_to_ours(source, "", "", config["num_layers"], names, layer_scale=False)
    source.check_used_up("SiT")
    return result


def revert_transformer_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    [`SiTTransformer1DModel`] weights under the authors' names: the inverse of [`convert_transformer_state_dict`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): State dict of a [`SiTTransformer1DModel`].

    Returns:
        `dict[str, torch.Tensor]`: The authors' keys.

    Raises:
        ValueError: If a key is not one of [`SiTTransformer1DModel`]'s; the message lists them.
    """
    rest = dict(state_dict)
    result = _blocks_to_authors(rest, "", "")
    result |= {theirs: rest.pop(ours) for ours, theirs in _TRANSFORMER_KEYS.items() if ours in rest}
    if rest:
        raise ValueError(f"keys that are not SiTTransformer1DModel's: {sorted(rest)}.")
    return result
