"""Key tables between the authors' checkpoints and this library's models.

Everything here is a pure function of dictionaries, strict in both directions: a key that the tables do not know, or
one that is missing, is an error that lists it. What the authors' training code saves next to the model is dropped by
name.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch


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


def convert_autoencoder_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The authors' tokenizer weights under the names of [`AutoencoderMAE`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The authors' weights.
        config (`Mapping`): The converted config, of [`~conversion.configs.autoencoder_config`].

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


def convert_transformer_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The authors' SiT weights under the names of [`SiTTransformer1DModel`].

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The authors' weights.
        config (`Mapping`): The converted config, of [`~conversion.configs.transformer_config`].

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
