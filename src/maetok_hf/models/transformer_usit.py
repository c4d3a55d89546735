"""USiT on 1D latent tokens: a U-ViT trained to predict velocities."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from torch import nn

from .layers import TransformerBlock, build_norm, compile_apart, run_block
from .transformer_base import LatentTransformer1DModel


# U-ViT keeps torch's default where the other models here have 1e-6
_NORM_EPS = 1e-5


class USiTTransformer1DModel(LatentTransformer1DModel):
    r"""
    USiT ([DC-AE, arXiv 2410.10733](https://huggingface.co/papers/2410.10733)) over a sequence of continuous latent
    tokens: a U-ViT ([arXiv 2209.12152](https://huggingface.co/papers/2209.12152)) that predicts velocities.

    Class and time enter as two tokens before the latent tokens, the time as bare sinusoids; positions are learned; the
    output of every block of the first half is merged into its mirror image in the second half, by concatenation and a
    linear. The velocity is `d x_t / d t` of a path from data (t = 0) to noise (t = 1); for the linear path that is
    `noise - data`. Latents are normalised ones (`normalize_latents`).

    Published sizes, with 32 channels and 1000 classes:

    | size | `num_layers` | `num_attention_heads` | `attention_head_dim` | width | parameters |
    | --- | --- | --- | --- | --- | --- |
    | H (default) | 29 | 16 | 72 | 1152 | 501 M |
    | 2B | 29 | 32 | 64 | 2048 | 1.58 B |

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods (loading,
    saving, moving, casting).

    Parameters:
        sample_size (`int`, *optional*, defaults to 128): Number of latent tokens.
        in_channels (`int`, *optional*, defaults to 32): Channels of a latent token.
        num_layers (`int`, *optional*, defaults to 29):
            Number of blocks, odd: as many on the way in as on the way out, and one between.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads.
        attention_head_dim (`int`, *optional*, defaults to 72): Channels per head.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Hidden width of the MLPs over the width.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes. The null class has index `num_classes`.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            Probability with which a label becomes the null class, in training only.
        path (`str`, *optional*, defaults to `"linear"`):
            The path the model is trained on, `"linear"` or `"cosine"`; schedulers must follow the same one.
        temperature_embedding (`bool`, *optional*, defaults to `False`):
            Whether the model takes a guidance temperature (guidance-free training, arXiv 2501.15420), whose embedding
            is added to the time token.

    Raises:
        ValueError: If a size is not positive, `num_layers` is even or below 3, the width is odd, a probability lies
            outside [0, 1] or the path is unknown.
    """

    num_prefix_tokens = 2  # class and time

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 32,
        num_layers: int = 29,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        path: str = "linear",
        temperature_embedding: bool = False,
    ):
        super().__init__()
        if num_layers < 3 or num_layers % 2 == 0:
            raise ValueError(
                f"`num_layers` must be odd and at least 3 (blocks in, one between, as many out), got {num_layers}."
            )
        hidden_size = self.hidden_size
        self.num_in_blocks = num_layers // 2
        self.proj_in = nn.Linear(in_channels, hidden_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_prefix_tokens + sample_size, hidden_size))
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = nn.Identity()
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                layer_scale_init_value=None,
                norm_eps=_NORM_EPS,
                qkv_bias=False,
                skip_connection=index > self.num_in_blocks,
            )
            for index in range(num_layers)
        )
        self.norm_out = build_norm("layer_norm", hidden_size, _NORM_EPS, affine=True)
        self.proj_out = nn.Linear(hidden_size, in_channels)
        self._init_weights()
        if temperature_embedding:
            self._add_temperature_embedding()  # last: the other weights of a seed do not depend on it

    def _init_weights(self) -> None:
        """The initialisation of U-ViT; its class table is standard normal, as large as the sinusoids beside it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compile the transformer blocks, one graph for those with and one for those without a skip connection: see
        [`ModelMixin.compile_repeated_blocks`].

        Args:
            args, kwargs: Passed on to `torch.compile`.
        """
        first_with_skip = self.num_in_blocks + 1
        compile_apart(self.transformer_blocks[:first_with_skip], *args, **kwargs)
        compile_apart(self.transformer_blocks[first_with_skip:], *args, **kwargs)

    def _velocity(
        self, hidden_states: torch.Tensor, time_embedding: torch.Tensor, class_embedding: torch.Tensor
    ) -> torch.Tensor:
        class_token = class_embedding.to(hidden_states.dtype).unsqueeze(1)
        tokens = torch.cat([class_token, time_embedding.unsqueeze(1), hidden_states], dim=1)  # (B, 2 + L, D)
        hidden_states = tokens + self.pos_embed.to(tokens.dtype)

        skips = []
        for index, block in enumerate(self.transformer_blocks):
            skip = skips.pop() if index > self.num_in_blocks else None
            hidden_states = run_block(self, block, hidden_states, None, None, skip)
            if index < self.num_in_blocks:
                skips.append(hidden_states)
        return self.proj_out(self.norm_out(hidden_states[:, self.num_prefix_tokens :]))  # (B, L, C)
