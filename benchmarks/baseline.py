"""The naive form of the models, as research code has it: a yardstick for the suite, not for use.

Built from the weights of one of our models, each class computes the same function in the common way: softmax
attention by hand, the whole matrix of scores in memory; rotary positions as complex numbers, made anew in every block
and applied to a slice of the tokens that is then put back by concatenation; a sampler whose batch is doubled in every
step, in the guidance interval or not, with its state in float64. This is the one second attention of the project, and
tests compare every class here with the model it was built from.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from maetok_hf import AutoencoderMAE, SiTTransformer1DModel
from maetok_hf.models.layers import MAETokAttention, Modulation, TransformerBlock
from maetok_hf.models.vit import ViTDecoder, ViTEncoder


class NaiveAttention(nn.Module):
    """
    Softmax attention by hand behind one projection for queries, keys and values.

    Args:
        attention ([`MAETokAttention`]): Weights.
    """

    def __init__(self, attention: MAETokAttention):
        super().__init__()
        parts = (attention.to_q, attention.to_k, attention.to_v)
        self.num_heads, self.head_dim = attention.heads, attention.head_dim
        self.qkv = nn.Linear(parts[0].in_features, 3 * attention.inner_dim)
        self.qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.proj = attention.to_out[0]

    def forward(self, x: torch.Tensor, turns: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(batch_size, num_tokens, dim)`): Tokens.
            turns (complex `torch.Tensor` of shape `(heads, num_turned, head_dim / 2)`, *optional*): Rotary positions.
            first (`int`, *optional*, defaults to 0): The first of the tokens that are turned.

        Returns:
            `torch.Tensor`: Shape of `x`.
        """
        batch_size, num_tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch_size, num_tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if turns is not None:
            q, k = (turn_slice(part, turns, first) for part in (q, k))
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        out = scores.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch_size, num_tokens, -1))


def turn_slice(tokens: torch.Tensor, turns: torch.Tensor, first: int) -> torch.Tensor:
    """Turn the tokens from `first` on, as many as there are turns, and put them back between the others."""
    last = first + turns.shape[-2]
    middle = tokens[:, :, first:last]
    pairs = torch.view_as_complex(middle.to(turns.real.dtype).reshape(*middle.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * turns).flatten(-2).to(tokens.dtype)
    return torch.cat([tokens[:, :, :first], turned, tokens[:, :, last:]], dim=2)


def complex_turns(freqs: torch.Tensor, num_heads: int, grid: tuple[int, int]) -> torch.Tensor:
    """Rotary positions of one layer as complex numbers, from its frequencies of shape `(2, heads * head_dim / 2)`."""
    number = torch.arange(grid[0] * grid[1], dtype=freqs.dtype, device=freqs.device)
    x, y = number % grid[1], torch.div(number, grid[1], rounding_mode="floor")
    by_column = (x.unsqueeze(-1) @ freqs[0].unsqueeze(0)).unflatten(-1, (num_heads, -1))
    by_row = (y.unsqueeze(-1) @ freqs[1].unsqueeze(0)).unflatten(-1, (num_heads, -1))
    angles = (by_column + by_row).transpose(0, 1)  # (heads, num_patches, head_dim / 2)
    return torch.polar(torch.ones_like(angles), angles)


class NaiveMLP(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.fc1, self.fc2 = block.ff.net[0].proj, block.ff.net[2]
        self.approximate = block.ff.net[0].approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class NaiveBlock(nn.Module):
    """
    A block of one of the tokenizer's ViTs.

    Args:
        block ([`TransformerBlock`]): Weights; plain, or modulated by latents.
    """

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn, self.mlp = NaiveAttention(block.attn), NaiveMLP(block)
        self.scale1, self.scale2 = block.scale1, block.scale2
        self.modulation = block.modulation if block.modulation_type == "latent" else None

    def forward(self, x: torch.Tensor, latent: torch.Tensor | None, turns: torch.Tensor, first: int) -> torch.Tensor:
        if self.modulation is None:
            x = x + self.scale1(self.attn(self.norm1(x), turns, first))
            return x + self.scale2(self.mlp(self.norm2(x)))
        shift1, scale1, shift2, scale2 = self.modulation.linear(F.silu(latent)).chunk(4, dim=-1)
        x = x + self.attn(scale_latents(self.norm1(x), shift1, scale1), turns, first)
        return x + self.mlp(scale_latents(self.norm2(x), shift2, scale2))


def scale_latents(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale and shift the last tokens, and put them behind the others again."""
    others, latents = x[:, : -shift.shape[1]], x[:, -shift.shape[1] :]
    return torch.cat([others, latents * scale + shift], dim=1)


class NaiveTokenizer(nn.Module):
    """
    Encoder and decoder at the size that the tokenizer was built for.

    Args:
        tokenizer ([`AutoencoderMAE`]): Weights; with rotary positions, latent tokens and no posterior.
    """

    def __init__(self, tokenizer: AutoencoderMAE):
        super().__init__()
        config = tokenizer.config
        assert config.position_embedding == "rope" and config.num_latent_tokens and not config.gaussian_posterior
        self.config = config
        self.encoder, self.decoder = tokenizer.encoder, tokenizer.decoder
        self.blocks = nn.ModuleDict(
            {
                name: nn.ModuleList(map(NaiveBlock, vit.transformer_blocks))
                for name, vit in (("encoder", self.encoder), ("decoder", self.decoder))
            }
        )

    def _run(
        self, name: str, vit: ViTEncoder | ViTDecoder, x: torch.Tensor, latent: torch.Tensor | None
    ) -> torch.Tensor:
        for block, freqs in zip(self.blocks[name], vit.rope.freqs.unbind(1), strict=True):
            turns = complex_turns(freqs, vit.rope.num_attention_heads, vit.grid_size)
            x = block(x, latent, turns, vit.num_prefix_tokens)
        return vit.norm(x)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Raw latents `(batch_size, num_latent_tokens, latent_channels)` of images `(batch_size, 3, side, side)`."""
        vit, batch_size = self.encoder, images.shape[0]
        x = vit.patch_embed(images).flatten(2).transpose(1, 2)
        if vit.class_token is not None:
            x = torch.cat([vit.class_token.expand(batch_size, -1, -1), x], dim=1)
        latents = vit.latent_tokens.expand(batch_size, -1, -1) + vit.latent_pos_embed
        x = torch.cat([x + vit.pos_embed, latents], dim=1)
        x = self._run("encoder", vit, x, None)
        return vit.proj_out(x[:, -self.config.num_latent_tokens :])

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Images `(batch_size, 3, side, side)` of raw latents `(batch_size, num_latent_tokens, latent_channels)`."""
        vit, batch_size = self.decoder, latent.shape[0]
        (rows, columns), side = vit.grid_size, self.config.patch_size
        x = vit.mask_token.repeat(batch_size, rows * columns, 1)
        x = torch.cat([x, vit.proj_in(latent) + vit.latent_pos_embed], dim=1)
        if vit.class_token is not None:
            x = torch.cat([vit.class_token.expand(batch_size, -1, -1), x], dim=1)
        modulated = vit.norm_modulation is not None
        x = self._run("decoder", vit, x, latent if modulated else None)
        if modulated:
            shift, scale = vit.norm_modulation.linear(F.silu(latent)).chunk(2, dim=-1)
            x = scale_latents(x, shift, scale)
        first = vit.num_prefix_tokens
        patches = vit.proj_out(x[:, first : first + rows * columns])
        patches = patches.reshape(batch_size, rows, columns, side, side, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(batch_size, -1, rows * side, columns * side)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructions of images, both `(batch_size, 3, side, side)`."""
        return self.decode(self.encode(images))


class NaiveSiTBlock(nn.Module):
    """A block of SiT; its modulation is computed for every image."""

    def __init__(self, block: TransformerBlock):
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn, self.mlp = NaiveAttention(block.attn), NaiveMLP(block)
        self.modulation: Modulation = block.modulation

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        terms = self.modulation.linear(F.silu(c)).unsqueeze(1).chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = terms
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class NaiveSiT(nn.Module):
    """
    SiT, and its sampler.

    Args:
        transformer ([`SiTTransformer1DModel`]): Weights; without a temperature embedding.
    """

    def __init__(self, transformer: SiTTransformer1DModel):
        super().__init__()
        assert transformer.temperature_embed is None and transformer.config.path == "linear"
        self.config, self.model = transformer.config, transformer
        self.blocks = nn.ModuleList(map(NaiveSiTBlock, transformer.transformer_blocks))

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Velocities of latents `(batch_size, num_tokens, channels)` at times and of classes `(batch_size,)`."""
        model = self.model
        x = model.proj_in(x) + model.pos_embed.to(x.dtype)
        c = model.time_embed(model.time_proj(t).to(x.dtype)) + model.class_embed(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = model.norm_out_modulation.linear(F.silu(c)).unsqueeze(1).chunk(2, dim=-1)
        return model.proj_out(model.norm_out(x) * (1 + scale) + shift)

    @torch.no_grad()
    def sample(
        self,
        noise: torch.Tensor,
        labels: torch.Tensor,
        draws: Sequence[torch.Tensor] | None,
        num_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        last_step_size: float = 0.04,
    ) -> torch.Tensor:
        """
        Latents by Euler-Maruyama (Euler without `draws`) and classifier-free guidance.

        Conditional and null halves go through the model together in every step; outside the interval the null half is
        thrown away.

        Args:
            noise (`torch.Tensor` of shape `(batch_size, num_tokens, channels)`): Where it begins.
            labels (`torch.LongTensor` of shape `(batch_size,)`): Classes.
            draws (sequence of `num_steps - 1` tensors of the shape of `noise`, *optional*): Noise of the steps.
            num_steps (`int`): Steps.
            guidance_scale (`float`): Scale.
            guidance_interval (`tuple[float, float]`): Times between which it applies.
            last_step_size (`float`, *optional*, defaults to 0.04): As the scheduler's.

        Returns:
            `torch.Tensor` of the shape of `noise`, in float64.
        """
        end = 1 / num_steps if draws is None else last_step_size
        times = np.append(np.linspace(1.0, end, num_steps), 0.0)
        dtype = self.model.proj_in.weight.dtype
        y = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        x = noise.double()
        for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
            doubled = torch.cat([x, x]).to(dtype)
            time = torch.full((len(y),), t, dtype=torch.float32, device=x.device)
            conditional, null = self(doubled, time, y).double().chunk(2)
            inside = guidance_interval[0] <= t <= guidance_interval[1]
            velocity = null + guidance_scale * (conditional - null) if inside else conditional
            if draws is None:
                x = x + velocity * (t_next - t)
                continue
            score = -((1 - t) * velocity + x) / t
            x = x + (velocity - t * score) * (t_next - t)
            if t_next > 0:
                x = x + np.sqrt(2 * t * (t - t_next)) * draws[step].double()
        return x
