"""What the authors' checkpoints compute, as plain functions of their weights: the yardstick of a conversion.

A converted model cannot vouch for itself: a key that is mapped to the wrong place, a config entry that is misread or a
file that is written badly gives a model that is as sure of itself as the right one. These functions therefore share
nothing with [`AutoencoderMAE`] and [`SiTTransformer1DModel`]: not the key tables, not the converted config, not a
layer. They follow the paper's formulas with the authors' names, in float64, one matrix at a time, so that what differs
is the rounding of the model in question. Their own correctness is tested on outputs of the authors' code.

They are no second model: there is nothing to train, to configure or to make fast, and only
[`~conversion.verification`] calls them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch


HEAD_DIM = 64  # of the tokenizers' ViTs
EPS = 1e-6  # of every norm


class _Weights:
    """Float64 copies of weights, made when they are needed; `_Weights(...).under("blocks.0.")` adds to their names."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor], prefix: str = ""):
        self._state_dict, self._prefix = state_dict, prefix

    def under(self, prefix: str) -> "_Weights":
        return _Weights(self._state_dict, self._prefix + prefix)

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._state_dict

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state_dict[self._prefix + name].detach().cpu().double()

    def count_blocks(self) -> int:
        count = 0
        while f"blocks.{count}.attn.qkv.weight" in self:
            count += 1
        return count


def _linear(x: torch.Tensor, weights: _Weights, name: str) -> torch.Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _standardize(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + EPS).sqrt()


def _norm(x: torch.Tensor, weights: _Weights, name: str) -> torch.Tensor:
    return _standardize(x) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _mix_tokens(
    x: torch.Tensor, weights: _Weights, num_heads: int, angles: torch.Tensor | None, first: int
) -> torch.Tensor:
    """Softmax of the scaled products of queries and keys; those of the tokens from `first` on are turned by `angles`
    `(N, heads, head_dim / 2)`, if there are any."""
    query, key, value = _linear(x, weights, "qkv").unflatten(-1, (3, num_heads, -1)).unbind(dim=2)  # (B, L, H, D)
    if angles is not None:
        turn = torch.polar(torch.ones_like(angles), angles)
        last = first + len(angles)
        for vectors in (query, key):
            pairs = vectors[:, first:last].unflatten(-1, (-1, 2)).contiguous()
            vectors[:, first:last] = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
    mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value).flatten(2)
    return _linear(mixed, weights, "proj")


def _angles(freqs: torch.Tensor, layer: int, side: int) -> torch.Tensor:
    """Rotations of the image tokens in one layer: column times the first frequency plus row times the second."""
    rows = torch.arange(side, dtype=torch.float64).repeat_interleave(side)
    columns = torch.arange(side, dtype=torch.float64).repeat(side)
    angles = columns[:, None] * freqs[0, layer] + rows[:, None] * freqs[1, layer]  # (N, heads * head_dim / 2)
    return angles.unflatten(1, (-1, HEAD_DIM // 2))


def _modulate_last(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift the latent tokens, which are the last ones."""
    count = shift.shape[1]
    return torch.cat([x[:, :-count], x[:, -count:] * scale + shift], dim=1)


def _run_vit(
    x: torch.Tensor, weights: _Weights, side: int, prefix: int, freqs: torch.Tensor | None, latent: torch.Tensor | None
) -> torch.Tensor:
    """All blocks of a tokenizer's ViT; `latent` modulates those of the form that is modulated."""
    num_heads = x.shape[-1] // HEAD_DIM
    for layer in range(weights.count_blocks()):
        block = weights.under(f"blocks.{layer}.")
        angles = None if freqs is None else _angles(freqs, layer, side)
        if latent is None:
            mixed = _mix_tokens(_norm(x, block, "norm1"), block.under("attn."), num_heads, angles, prefix)
            x = x + block["ls1.gamma"] * mixed
            hidden = _gelu(_linear(_norm(x, block, "norm2"), block, "mlp.fc1"))
            x = x + block["ls2.gamma"] * _linear(hidden, block, "mlp.fc2")
        else:
            modulation = _linear(_silu(latent), block, "adaLN_modulation.1")
            shift_attn, scale_attn, shift_mlp, scale_mlp = modulation.chunk(4, dim=-1)
            normed = _modulate_last(_standardize(x), shift_attn, scale_attn)
            x = x + _mix_tokens(normed, block.under("attn."), num_heads, angles, prefix)
            normed = _modulate_last(_standardize(x), shift_mlp, scale_mlp)
            x = x + _linear(_gelu(_linear(normed, block, "mlp.fc1")), block, "mlp.fc2")
    return x


def _side(config: Mapping[str, Any]) -> int:
    return config["image_size"] // config["enc_patch_size"]


def reference_encode(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], image: torch.Tensor
) -> torch.Tensor:
    """
    Latents of images by an authors' tokenizer.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the authors' names.
        config (`Mapping`): The authors' `config.json`.
        image (`torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`): Images in `[-1, 1]`.

    Returns:
        `torch.Tensor` of shape `(batch_size, num_latent_tokens, codebook_embed_dim)`: Raw latents in float64.
    """
    weights, side, patch_size = _Weights(state_dict), _side(config), config["enc_patch_size"]
    vit = weights.under("encoder.model.")
    pixels = image.double().unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, 3, h, w, P, P)
    pixels = pixels.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)  # (B, N, 3 * P * P)
    patches = pixels @ vit["patch_embed.proj.weight"].flatten(1).T + vit["patch_embed.proj.bias"]
    batch_size = len(image)
    x = torch.cat([vit["cls_token"].expand(batch_size, -1, -1), patches], dim=1) + vit["pos_embed"]
    first = 1
    if config["num_latent_tokens"] > 0:
        latents = weights["encoder.latent_tokens"] + weights["encoder.latent_pos_embed"]
        x = torch.cat([x, latents.expand(batch_size, -1, -1)], dim=1)
        first = 1 + side * side
    freqs = weights["encoder.freqs"] if config.get("use_rope") else None
    x = _norm(_run_vit(x, vit, side, 1, freqs, None), vit, "norm")
    return _linear(x[:, first:], weights, "quant_conv")


def reference_decode(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], latent: torch.Tensor
) -> torch.Tensor:
    """
    Images of latents by an authors' tokenizer.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the authors' names.
        config (`Mapping`): The authors' `config.json`.
        latent (`torch.Tensor` of shape `(batch_size, num_latent_tokens, codebook_embed_dim)`): Raw latents.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, image_size, image_size)`: Images in float64, not clamped.
    """
    weights, side, latent = _Weights(state_dict), _side(config), latent.double()
    vit, use_rope = weights.under("decoder.model."), config.get("use_rope", False)
    batch_size, prefix = len(latent), int(config.get("dec_cls_token", True))
    projected = _linear(latent, weights, "post_quant_conv")
    has_latent_tokens = config["num_latent_tokens"] > 0
    x = weights["decoder.mask_token"].expand(batch_size, side * side, -1) if has_latent_tokens else projected
    if prefix:
        x = torch.cat([vit["cls_token"].expand(batch_size, -1, -1), x], dim=1)
    if not use_rope:
        x = x + vit["pos_embed"][:, 1 - prefix :]  # the table always has an entry for the class token
    if has_latent_tokens:
        x = torch.cat([x, projected + weights["decoder.latent_pos_embed"]], dim=1)
    freqs = weights["decoder.freqs"] if use_rope else None
    is_modulated = "movq" in config.get("decoder_model", "")
    x = _run_vit(x, vit, side, prefix, freqs, latent if is_modulated else None)
    # the final norm's modulation acts on the latent tokens, which do not leave
    x = (_standardize(x) if is_modulated else _norm(x, vit, "norm"))[:, prefix : prefix + side * side]
    patches = _linear(x, weights, "decoder.to_pixel.model")
    patch_size = config["dec_patch_size"]
    patches = patches.unflatten(-1, (patch_size, patch_size, -1)).unflatten(1, (side, side))  # (B, h, w, P, P, 3)
    return torch.einsum("bhwpqc->bchpwq", patches).flatten(4, 5).flatten(2, 3)


def reference_velocity(
    state_dict: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    sample: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor,
) -> torch.Tensor:
    """
    Velocity of noisy latents by an authors' SiT.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the authors' names.
        config (`Mapping`): The authors' `config.json`.
        sample (`torch.Tensor` of shape `(batch_size, num_tokens, in_channels)`): Noisy normalised latents.
        timestep (`torch.Tensor` of shape `(batch_size,)`): Times in `[0, 1]`, noise at 1.
        class_labels (`torch.Tensor` of shape `(batch_size,)`): Classes; `num_classes` is the null class.

    Returns:
        `torch.Tensor` of the shape of `sample`: Velocities in float64.
    """
    weights = _Weights(state_dict)
    x = _linear(sample.double(), weights, "x_embedder") + weights["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = timestep.double()[:, None] * frequencies
    time = _silu(_linear(torch.cat([angles.cos(), angles.sin()], dim=-1), weights, "t_embedder.mlp.0"))
    condition = _linear(time, weights, "t_embedder.mlp.2") + weights["y_embedder.embedding_table.weight"][class_labels]
    condition = _silu(condition)[:, None]  # (B, 1, D)
    for layer in range(weights.count_blocks()):
        block = weights.under(f"blocks.{layer}.")
        chunks = _linear(condition, block, "adaLN_modulation.1").chunk(6, dim=-1)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = chunks
        normed = _standardize(x) * (1 + scale_attn) + shift_attn
        x = x + gate_attn * _mix_tokens(normed, block.under("attn."), config["num_heads"], None, 0)
        normed = _standardize(x) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * _linear(_gelu_tanh(_linear(normed, block, "mlp.fc1")), block, "mlp.fc2")
    shift, scale = _linear(condition, weights, "final_layer.adaLN_modulation.1").chunk(2, dim=-1)
    return _linear(_standardize(x) * (1 + scale) + shift, weights, "final_layer.linear")
