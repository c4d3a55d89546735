"""Position tables: fixed 1D sine-cosine, 1D rotary, learned absolute grids that can be resampled, mixed 2D rotary."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def sincos_position_embedding(num_positions: int, dim: int) -> torch.Tensor:
    """
    Fixed 1D positions of SiT on token sequences: even channels sine, odd channels cosine of
    `position * 10000 ** (-2 i / dim)`.

    Args:
        num_positions (`int`): Length of the sequence.
        dim (`int`): Even width of the tokens.

    Returns:
        `torch.Tensor` of shape `(1, num_positions, dim)`: float32 whatever the default dtype, values in `[-1, 1]`.
    """
    # computed in float64: the largest angle is `num_positions`, where float32 would already lose 1e-5
    position = torch.arange(num_positions, dtype=torch.float64).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    table = torch.stack([torch.sin(position * frequency), torch.cos(position * frequency)], dim=-1)
    return table.flatten(1).unsqueeze(0).to(torch.float32)


def rotary_tables(
    num_positions: int, attention_head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rotary positions of a token sequence (RoFormer, arXiv 2104.09864, equation 15): pair `j` of the token at index `n`
    is turned by `n * 10000 ** (-2 j / attention_head_dim)`, in every head alike.

    Args:
        num_positions (`int`): Length of the sequence.
        attention_head_dim (`int`): Channels per head, even.
        device (`torch.device`): Where the tables are made.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Float32 or float64.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Cosines and sines, each of shape `(num_positions, 1, head_dim // 2)`.
    """
    exponent = torch.arange(0, attention_head_dim, 2, dtype=dtype, device=device) / -attention_head_dim
    positions = torch.arange(num_positions, dtype=dtype, device=device)
    angles = (positions.unsqueeze(1) * torch.pow(10000.0, exponent)).unsqueeze(1)
    return torch.cos(angles), torch.sin(angles)


def resample_position_embedding(
    pos_embed: torch.Tensor, base_grid: tuple[int, int], grid: tuple[int, int], num_prefix_tokens: int
) -> torch.Tensor:
    """
    Resample a learned grid of absolute positions to another grid (bicubic, antialiased); prefix entries are untouched.

    Args:
        pos_embed (`torch.Tensor` of shape `(1, num_prefix_tokens + rows * columns, dim)`): The learned table.
        base_grid (`tuple[int, int]`): Rows and columns of the table.
        grid (`tuple[int, int]`): Rows and columns wanted. At the table's own grid the table itself is returned.
        num_prefix_tokens (`int`): Leading entries that belong to no grid position (the class token's).

    Returns:
        `torch.Tensor` of shape `(1, num_prefix_tokens + grid[0] * grid[1], dim)`, dtype of `pos_embed`.
    """
    if grid == base_grid:
        return pos_embed
    prefix, table = pos_embed[:, :num_prefix_tokens], pos_embed[:, num_prefix_tokens:]
    table = table.float().unflatten(1, base_grid).permute(0, 3, 1, 2)  # (1, dim, rows, columns)
    table = F.interpolate(table, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, table.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


class MixedRotaryEmbedding(nn.Module):
    """
    Mixed 2D rotary positions (RoPE-Mixed, arXiv 2403.13298, equation 13): every layer, head and channel pair has its
    own learned frequency along the columns and along the rows.

    Args:
        num_layers (`int`): Number of blocks that use the tables.
        num_attention_heads (`int`): Number of heads.
        attention_head_dim (`int`): Channels per head, a multiple of 4.
        theta (`float`, *optional*, defaults to 10.0): Base of the initial frequencies.
    """

    def __init__(self, num_layers: int, num_attention_heads: int, attention_head_dim: int, theta: float = 10.0):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.attention_head_dim = attention_head_dim
        self.theta = theta
        # first axis: column (x), row (y); float32 always, since an angle is a frequency times a position
        shape = (2, num_layers, num_attention_heads * attention_head_dim // 2)
        self.freqs = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.reset_parameters()
        # (frequencies, shape of the sequence, tables) of the last pass that may keep them
        self._kept: tuple[torch.Tensor, tuple, list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies make their own tables

    def reset_parameters(self) -> None:
        """Axial frequencies `theta ** (-4 k / head_dim)`, turned by one random angle per layer and head."""
        # the uniform draw is an `nn.init` call so that loading a checkpoint skips it
        nn.init.uniform_(self.freqs, 0.0, 2 * math.pi)
        if self.freqs.is_meta:
            return
        quarter = self.attention_head_dim // 4
        exponent = -torch.arange(quarter, dtype=torch.float32) / quarter
        magnitude = torch.pow(torch.tensor(self.theta, dtype=torch.float32), exponent)
        with torch.no_grad():
            # one draw per head: the first entry of each head's pairs
            angle = self.freqs[0].unflatten(-1, (self.num_attention_heads, -1))[..., :1]  # (layers, heads, 1)
            x = torch.cat([magnitude * torch.cos(angle), -magnitude * torch.sin(angle)], dim=-1)
            y = torch.cat([magnitude * torch.sin(angle), magnitude * torch.cos(angle)], dim=-1)
            self.freqs.copy_(torch.stack([x.flatten(1), y.flatten(1)]))

    def forward(
        self, grid: tuple[int, int], num_prefix_tokens: int, num_suffix_tokens: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        Cosine and sine tables of every layer for a sequence of prefix, image (row-major) and suffix tokens, made for
        all layers together. Without gradients a CPU keeps those of the last shape, as long as the frequencies have the
        values they were made from.

        Args:
            grid (`tuple[int, int]`): Rows and columns of the image tokens; positions are their integer coordinates.
            num_prefix_tokens, num_suffix_tokens (`int`): Tokens before and after that are not rotated.

        Returns:
            `list` of one `(cos, sin)` pair per layer, each float32 (float64 in a float64 model) of shape
            `(num_prefix_tokens + rows * columns + num_suffix_tokens, heads, head_dim // 2)`.
        """
        if not self._keeps_tables():
            return self._tables(grid, num_prefix_tokens, num_suffix_tokens)
        freqs, shape = self.freqs, (*grid, num_prefix_tokens, num_suffix_tokens)
        if self._kept is not None:
            kept_freqs, kept_shape, tables = self._kept
            # values, because a version does not count changes through `.data`, which moving averages make
            if kept_shape == shape and kept_freqs.dtype == freqs.dtype and torch.equal(kept_freqs, freqs):
                return tables
        # what a pass in inference mode makes must serve passes outside it
        with torch.inference_mode(False), torch.no_grad():
            tables = self._tables(grid, num_prefix_tokens, num_suffix_tokens)
            self._kept = (freqs.detach().clone(), shape, tables)
        return tables

    def _apply(self, *args: Any, **kwargs: Any) -> "MixedRotaryEmbedding":
        self._kept = None  # tables of another device or type would only take memory
        return super()._apply(*args, **kwargs)

    def _keeps_tables(self) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return False
        # elsewhere the comparison would wait for the device; fake and sharded weights have no values to compare
        return self.freqs.device.type == "cpu" and type(self.freqs) is nn.Parameter

    def _tables(
        self, grid: tuple[int, int], num_prefix_tokens: int, num_suffix_tokens: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        freqs = self.freqs.to(torch.promote_types(self.freqs.dtype, torch.float32))
        freqs = freqs.unflatten(-1, (self.num_attention_heads, -1)).unsqueeze(2)  # (2, layers, 1, heads, head_dim / 2)
        rows, columns = (torch.arange(n, dtype=freqs.dtype, device=freqs.device) for n in grid)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        x, y = (axis.reshape(1, -1, 1, 1) for axis in (x, y))
        angles = x * freqs[0] + y * freqs[1]  # (layers, N, heads, head_dim / 2)
        # angle 0 is the identity: tokens without a position need no copy and no branch in the attention
        angles = F.pad(angles, (0, 0, 0, 0, num_prefix_tokens, num_suffix_tokens))
        return list(zip(torch.cos(angles).unbind(0), torch.sin(angles).unbind(0), strict=True))
