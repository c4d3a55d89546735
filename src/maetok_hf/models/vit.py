"""The tokenizer's two vision transformers: images to latent tokens, and latent tokens to per-patch features."""

import torch
from torch import nn

from .embeddings import MixedRotaryEmbedding, resample_position_embedding
from .layers import Modulation, TransformerBlock, compile_apart, run_block


def _run_blocks(
    model: nn.Module,
    hidden_states: torch.Tensor,
    conditioning: torch.Tensor | None,
    grid: tuple[int, int],
    num_prefix_tokens: int,
    kept: slice,
) -> torch.Tensor:
    """
    Run a ViT's blocks on `[prefix; image; suffix]` tokens, rotating the image tokens if the model has `rope`; only the
    tokens `kept` leave the last one, which computes nothing else for the others than their keys and values.
    """
    num_layers = len(model.transformer_blocks)
    rotary_embs = [None] * num_layers
    if model.rope is not None:
        num_suffix_tokens = hidden_states.shape[1] - num_prefix_tokens - grid[0] * grid[1]
        rotary_embs = model.rope(grid, num_prefix_tokens, num_suffix_tokens)

    for block, rotary_emb in zip(model.transformer_blocks[:-1], rotary_embs[:-1], strict=True):
        hidden_states = run_block(model, block, hidden_states, conditioning, rotary_emb)
    last = model.transformer_blocks[-1]
    return run_block(model, last, hidden_states, conditioning, rotary_embs[-1], None, kept)


def compile_blocks(model: nn.Module, *args, **kwargs) -> None:
    """
    Compile a ViT's blocks: one graph for the last, which some tokens do not leave, and one for all the others.

    Args:
        model ([`ViTEncoder`] or [`ViTDecoder`]): The ViT.
        args, kwargs: Passed on to `torch.compile`.
    """
    compile_apart(model.transformer_blocks[:-1], *args, **kwargs)
    compile_apart(model.transformer_blocks[-1:], *args, **kwargs)


@torch.no_grad()
def _init_vit_weights(model: nn.Module, initializer_range: float) -> None:
    """Xavier linears with zero bias, as masked autoencoders have them (MAE, arXiv 2111.06377, appendix A.1)."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Modulation):
            # terms alternate shift, scale: a scale that starts at 1 makes the fresh modulated decoder a plain one,
            # whereas a scale near 0 would hide the latents from it
            for scale in module.linear.bias.chunk(module.num_chunks)[1::2]:
                nn.init.ones_(scale)
    for name in ("mask_token", "latent_tokens", "latent_pos_embed", "pos_embed"):
        if getattr(model, name, None) is not None:
            nn.init.normal_(getattr(model, name), std=initializer_range)
    if model.class_token is not None:
        nn.init.normal_(model.class_token, std=1e-6)


class ViTEncoder(nn.Module):
    """
    Image to latent tokens: a ViT over `[class token; patch tokens; latent tokens]` of which only the latent tokens
    leave, after the final norm and a linear (MAETok, arXiv 2502.03444, section 3.2).

    Args:
        in_channels (`int`): Channels of the image.
        patch_size (`int`): Side of a patch in pixels.
        out_channels (`int`): Channels of an output token (twice the latent channels for a Gaussian posterior).
        num_latent_tokens (`int`): Number of learned latent tokens; 0 returns the image tokens instead.
        grid_size (`tuple[int, int]`): Rows and columns of patches of the absolute position table.
        hidden_size, num_layers, num_attention_heads, mlp_ratio: Size of the ViT.
        position_embedding (`str`): `"rope"` or `"absolute"`. The absolute table is added in both cases.
        rope_theta (`float`): Base of the rotary frequencies.
        class_token (`bool`): Whether a class token leads the sequence.
        layer_scale_init_value (`float`): Initial LayerScale.
        initializer_range (`float`): Standard deviation of the initial tokens and position tables.
    """

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        out_channels: int,
        num_latent_tokens: int,
        grid_size: tuple[int, int],
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        position_embedding: str = "rope",
        rope_theta: float = 10.0,
        class_token: bool = True,
        layer_scale_init_value: float = 1e-5,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.grid_size = grid_size
        self.num_latent_tokens = num_latent_tokens
        self.num_prefix_tokens = int(class_token)
        num_positions = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        head_dim = hidden_size // num_attention_heads

        self.patch_embed = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        self.latent_tokens = self.latent_pos_embed = None
        if num_latent_tokens > 0:
            self.latent_tokens = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))
            self.latent_pos_embed = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))
        self.rope = None
        if position_embedding == "rope":
            self.rope = MixedRotaryEmbedding(num_layers, num_attention_heads, head_dim, rope_theta)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size, num_attention_heads, head_dim, mlp_ratio, layer_scale_init_value=layer_scale_init_value
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.proj_out = nn.Linear(hidden_size, out_channels)
        _init_vit_weights(self, initializer_range)

    def forward(self, sample: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in `[-1, 1]`.
            mask (`torch.BoolTensor` of shape `(batch_size, N)`, *optional*):
                True where a patch embedding is replaced by the mask token, before positions are added.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_latent_tokens or N, out_channels)`.
        """
        # channels last: the embeddings come as tokens, and nothing is transposed
        patches = self.patch_embed(sample.contiguous(memory_format=torch.channels_last))
        batch_size, _, rows, columns = patches.shape
        hidden_states = patches.flatten(2).transpose(1, 2)  # (B, N, D)
        if mask is not None:
            hidden_states = torch.where(mask.unsqueeze(-1), self.mask_token.to(hidden_states.dtype), hidden_states)

        prefix = self.num_prefix_tokens
        pos_embed = resample_position_embedding(self.pos_embed, self.grid_size, (rows, columns), prefix)
        tokens = [hidden_states + pos_embed[:, prefix:]]
        if self.class_token is not None:
            tokens.insert(0, (self.class_token + pos_embed[:, :prefix]).expand(batch_size, -1, -1))
        if self.latent_tokens is not None:
            tokens.append((self.latent_tokens + self.latent_pos_embed).expand(batch_size, -1, -1))
        hidden_states = torch.cat(tokens, dim=1)  # (B, prefix + N + L, D)

        first = prefix if self.latent_tokens is None else prefix + rows * columns
        hidden_states = _run_blocks(self, hidden_states, None, (rows, columns), prefix, slice(first, None))
        return self.proj_out(self.norm(hidden_states))


class ViTDecoder(nn.Module):
    """
    Latent tokens to features of every patch: a ViT over `[class token; mask tokens; latent tokens]` of which the image
    tokens leave. The pixel decoder and the auxiliary decoders are both this class (MAETok, section 3.2).

    Args:
        out_features (`int`): Features predicted per patch.
        latent_channels (`int`): Channels of a latent token.
        num_latent_tokens (`int`): Number of latent tokens; 0 means one latent per patch, standing in the place of the
            mask tokens.
        grid_size (`tuple[int, int]`): Rows and columns of patches the decoder is built for.
        hidden_size, num_layers, num_attention_heads, mlp_ratio: Size of the ViT.
        position_embedding (`str`): `"rope"` or `"absolute"`.
        rope_theta (`float`): Base of the rotary frequencies.
        modulated (`bool`): Whether the unprojected latents modulate the latent tokens after every norm.
        class_token (`bool`): Whether a class token leads the sequence.
        layer_scale_init_value (`float`): Initial LayerScale of the plain form; the modulated form has none.
        drop_path_rate (`float`): Stochastic depth in training.
        initializer_range (`float`): Standard deviation of the initial tokens and position tables.

    Raises:
        ValueError: If `modulated` is combined with `num_latent_tokens=0`.
    """

    def __init__(
        self,
        out_features: int,
        latent_channels: int,
        num_latent_tokens: int,
        grid_size: tuple[int, int],
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float = 4.0,
        position_embedding: str = "rope",
        rope_theta: float = 10.0,
        modulated: bool = False,
        class_token: bool = True,
        layer_scale_init_value: float = 1e-5,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        if modulated and num_latent_tokens == 0:
            raise ValueError(
                "a modulated decoder needs latent tokens apart from the image tokens, but `num_latent_tokens` is 0: "
                "use the plain decoder or `num_latent_tokens` > 0."
            )
        self.gradient_checkpointing = False
        self.grid_size = grid_size
        self.num_latent_tokens = num_latent_tokens
        self.num_prefix_tokens = int(class_token)
        num_positions = self.num_prefix_tokens + grid_size[0] * grid_size[1]
        head_dim = hidden_size // num_attention_heads

        self.proj_in = nn.Linear(latent_channels, hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size)) if class_token else None
        self.mask_token = self.latent_pos_embed = None
        if num_latent_tokens > 0:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
            self.latent_pos_embed = nn.Parameter(torch.zeros(1, num_latent_tokens, hidden_size))
        self.rope = self.pos_embed = None
        if position_embedding == "rope":
            self.rope = MixedRotaryEmbedding(num_layers, num_attention_heads, head_dim, rope_theta)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, hidden_size))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                num_attention_heads,
                head_dim,
                mlp_ratio,
                modulation="latent" if modulated else None,
                conditioning_dim=latent_channels,
                layer_scale_init_value=layer_scale_init_value,
                drop_path_rate=drop_path_rate,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=not modulated)
        self.norm_modulation = Modulation(latent_channels, hidden_size, 2) if modulated else None
        self.proj_out = nn.Linear(hidden_size, out_features)
        _init_vit_weights(self, initializer_range)

    def forward(self, latent: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Args:
            latent (`torch.Tensor` of shape `(batch_size, num_latent_tokens or N, latent_channels)`): Raw latents.
            grid (`tuple[int, int]`, *optional*): Rows and columns of patches; defaults to `grid_size`.

        Returns:
            `torch.Tensor` of shape `(batch_size, rows * columns, out_features)`, tokens in row-major order.
        """
        grid = self.grid_size if grid is None else grid
        batch_size, prefix, num_patches = latent.shape[0], self.num_prefix_tokens, grid[0] * grid[1]
        projected = self.proj_in(latent)

        image_tokens = projected if self.mask_token is None else self.mask_token.expand(batch_size, num_patches, -1)
        class_token = self.class_token
        if self.pos_embed is not None:
            pos_embed = resample_position_embedding(self.pos_embed, self.grid_size, grid, prefix)
            image_tokens = image_tokens + pos_embed[:, prefix:]
            class_token = None if class_token is None else class_token + pos_embed[:, :prefix]
        tokens = [image_tokens]
        if class_token is not None:
            tokens.insert(0, class_token.expand(batch_size, -1, -1))
        if self.latent_pos_embed is not None:
            tokens.append(projected + self.latent_pos_embed)
        hidden_states = torch.cat(tokens, dim=1)  # (B, prefix + N + L, D)

        conditioning = None if self.norm_modulation is None else latent
        image = slice(prefix, prefix + num_patches)
        hidden_states = self.norm(_run_blocks(self, hidden_states, conditioning, grid, prefix, image))
        if self.norm_modulation is not None and torch.is_grad_enabled():
            # it would touch the latent tokens only, which do not leave; checkpoints hold its weights, and distributed
            # training wants a (zero) gradient for every parameter
            shift, scale = self.norm_modulation(latent[:, :1])
            hidden_states = hidden_states + 0 * (shift + scale)
        return self.proj_out(hidden_states)
