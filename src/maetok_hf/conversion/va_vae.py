"""VA-VAE, the autoencoder of LightningDiT (arXiv 2501.01423), as an `AutoencoderKL` of diffusers.

VA-VAE is the KL autoencoder of latent diffusion (arXiv 2112.10752): f16d32 has five levels of 128, 128, 256, 256 and
512 channels and 32 latent channels. Besides the middle, the level of the lowest resolution has attention after every
residual block, in diffusers an `AttnDownEncoderBlock2D` and an `AttnUpDecoderBlock2D`; with these every block of the
network has an exact counterpart. The converter of such files that diffusers has (`convert_ldm_vae_checkpoint`) knows
attention in the middle only and passes over keys that it does not know, so the table here is ours, and strict.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from .convert import _build, _resolve
from .state_dict import _shape, _Source
from .weight_files import find_state_dict, read_pt, read_safetensors


VA_VAE_WEIGHTS_NAME = "vavae-imagenet256-f16d32-dinov2.pt"

# What the published files hold besides the network: losses with their discriminator, the foundation model and the
# projection to its features, and averages of the weights, which the authors' own loading leaves aside too.
_TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
# (diffusers', published): parts of a key between dots; the middle's come first
_NAMES = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "down_blocks": "down",
    "up_blocks": "up",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _published_key(key: str, num_levels: int) -> str:
    """The published name of one of diffusers' keys; the decoder's levels are counted from the other end."""
    key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{num_levels - 1 - int(match[1])}", key)
    for ours, theirs in _NAMES.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    return key


def _count(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for key in state_dict if (match := pattern.match(key))})


def va_vae_config(state_dict: Mapping[str, torch.Tensor], sample_size: int = 256) -> dict[str, Any]:
    """
    The `AutoencoderKL` config of a VA-VAE, read from its weights.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The published weights.
        sample_size (`int`, *optional*, defaults to 256): Side of the training images, which the weights do not say.

    Returns:
        `dict`: Keyword arguments of `AutoencoderKL`. The scaling factor is 1: LightningDiT normalises latents by their
        statistics only.

    Raises:
        ValueError: If the weights are not in the published format, or the latents that are sampled have another number
            of channels than those of the decoder, for which `AutoencoderKL` has no form.
    """
    in_channels = _shape(state_dict, "encoder.conv_in.weight", 4)[1]
    num_levels = _count(state_dict, "encoder.down.")
    levels = range(num_levels)
    moments = _shape(state_dict, "encoder.conv_out.weight", 4)[0]
    latent_channels = _shape(state_dict, "decoder.conv_in.weight", 4)[1]
    quant, post_quant = (_shape(state_dict, f"{name}.weight", 4)[:2] for name in ("quant_conv", "post_quant_conv"))
    if not moments == 2 * latent_channels == quant[0] == quant[1] or post_quant[0] != post_quant[1]:
        raise ValueError(
            f"`quant_conv` maps {quant[1]} channels to {quant[0]} and `post_quant_conv` {post_quant[1]} to "
            f"{post_quant[0]}, but AutoencoderKL has a mean and a variance for each of the {latent_channels} channels "
            "of the decoder: this file has no counterpart there."
        )
    down = ["Attn" if f"encoder.down.{level}.attn.0.q.weight" in state_dict else "" for level in levels]
    up = ["Attn" if f"decoder.up.{level}.attn.0.q.weight" in state_dict else "" for level in reversed(levels)]
    return {
        "in_channels": in_channels,
        "out_channels": _shape(state_dict, "decoder.conv_out.weight", 4)[0],
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in down],
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in up],
        "block_out_channels": [
            _shape(state_dict, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in levels
        ],
        "layers_per_block": _count(state_dict, "encoder.down.0.block."),
        "latent_channels": latent_channels,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
    }


def convert_va_vae_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The published VA-VAE weights under the names of `AutoencoderKL`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): The published weights, with or without what training adds to them.
        config (`Mapping`): The converted config, of [`va_vae_config`].

    Returns:
        `dict[str, torch.Tensor]`: A complete state dict.

    Raises:
        ValueError: If a key is missing or unknown; the message lists all of them.
    """
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    source = _Source({key: value for key, value in state_dict.items() if not key.startswith(_TRAINING_ONLY)})
    num_levels = len(config["block_out_channels"])
    result = {key: source.take(_published_key(key, num_levels)) for key in expected}
    source.check_used_up("VA-VAE")
    for key, value in result.items():
        # 1 x 1 convolutions there, linear layers here
        if ".attentions." in key and value.shape[2:] == (1, 1):
            result[key] = value[:, :, 0, 0]
    return result


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return find_state_dict(path, read_pt(path), ("state_dict",))


def _statistics(content: Any, num_channels: int) -> dict[str, list[float]]:
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, expected a dictionary: is it the right file?")
    result = {}
    for name, key in (("latents_mean", "mean"), ("latents_std", "std")):
        values = content.get(key)
        if not isinstance(values, torch.Tensor) or values.numel() != num_channels:
            found = tuple(values.shape) if isinstance(values, torch.Tensor) else values
            raise ValueError(f"its `{key}` must have one number for each of {num_channels} channels, found {found}.")
        result[name] = values.double().flatten().tolist()
    mean, std = result.values()
    if not (all(map(math.isfinite, mean)) and all(0 < value < math.inf for value in std)):
        raise ValueError(f"its means must be finite and its deviations positive, found {result}.")
    return result


def _find(path_or_repo_id: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path:
    """A file in a folder or on the Hub, or beside another file."""
    path = Path(path_or_repo_id)
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and not (folder / name).is_file():
        raise OSError(f"the folder {folder} has no {name}: put it there, or give the name of the file that it has.")
    return _resolve(folder if folder.is_dir() else path_or_repo_id, name, revision, token)


def convert_va_vae(
    path_or_repo_id: str | Path,
    filename: str = VA_VAE_WEIGHTS_NAME,
    latents_stats: str | None = None,
    sample_size: int = 256,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AutoencoderKL:
    """
    Load a published VA-VAE, or another latent diffusion autoencoder in the same format.

    Args:
        path_or_repo_id (`str` or `Path`): The file (`.pt` or `.ckpt`, read with `weights_only=True`, or
            `.safetensors`), or the folder or Hub repo that it is in, such as `hustvl/vavae-imagenet256-f16d32-dinov2`.
        filename (`str`, *optional*, defaults to `"vavae-imagenet256-f16d32-dinov2.pt"`): Its name in that folder or
            repo.
        latents_stats (`str`, *optional*): Name of a file beside it with the mean and deviation of every latent channel
            (LightningDiT's `latents_stats.pt`), which become `latents_mean` and `latents_std` of the config.
        sample_size (`int`, *optional*, defaults to 256): Side of the training images, which the weights do not say.
        revision (`str`, *optional*): Revision of the Hub repo.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        `AutoencoderKL`: In float32 and evaluation mode. It takes and gives images in `[-1, 1]`; latents of f16d32 have
        shape `(batch_size, 32, height / 16, width / 16)`.

    Raises:
        OSError: If a file cannot be found.
        ValueError: If a key is missing or unknown (the message lists them), a block has no counterpart in
            `AutoencoderKL`, or a file is corrupt; the message names the file.
    """
    weights = Path(path_or_repo_id)
    if not weights.is_file():
        weights = _find(path_or_repo_id, filename, revision, token)
    state_dict = _read_weights(weights)
    try:
        config = va_vae_config(state_dict, sample_size)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    if latents_stats is not None:
        statistics = _find(path_or_repo_id, latents_stats, revision, token)
        content = read_pt(statistics)
        try:
            config |= _statistics(content, config["latent_channels"])
        except ValueError as error:
            raise ValueError(f"{statistics}: {error}") from error
    try:
        return _build(AutoencoderKL, config, convert_va_vae_state_dict(state_dict, config))
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
