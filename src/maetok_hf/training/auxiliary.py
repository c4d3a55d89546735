"""Auxiliary decoders: shallow readers of the latents that predict a target's features (MAETok, section 3.2)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.vit import ViTDecoder


class LinearDecoder(nn.Module):
    """
    The auxiliary decoder of depth 0: one affine map from the latents to the features of every patch.

    A dense map of `L x C` to `N x D` numbers would outweigh the tokenizer, so its weight is factored: one matrix mixes
    the `L` latent tokens into `N` patches, the same for all channels, and one maps the `C` channels to `D` features,
    the same for all patches. Latents that are image tokens already stand at their patches: only the second is left.

    Args:
        feature_dim (`int`): Features per patch, `D`.
        latent_channels (`int`): Channels of a latent token, `C`.
        num_latent_tokens (`int`): Number of latent tokens, `L`; 0 means one per patch.
        grid_size (`tuple[int, int]`): Rows and columns of patches, `N` in all.
    """

    def __init__(self, feature_dim: int, latent_channels: int, num_latent_tokens: int, grid_size: tuple[int, int]):
        super().__init__()
        self.grid_size = tuple(grid_size)
        self.token_mixing = None
        if num_latent_tokens > 0:
            # no bias: the one of `proj_out` makes the map affine
            self.token_mixing = nn.Linear(num_latent_tokens, grid_size[0] * grid_size[1], bias=False)
        self.proj_out = nn.Linear(latent_channels, feature_dim)

    def forward(self, latent: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """
        See [`AuxiliaryDecoder.forward`].

        Raises:
            ValueError: If `grid` is not the one whose token mixing was learned.
        """
        if self.token_mixing is not None:
            if grid is not None and tuple(grid) != self.grid_size:
                raise ValueError(
                    f"a linear auxiliary decoder is tied to the {self.grid_size} patches it is built for, got `grid`="
                    f"{tuple(grid)}: use `num_layers` > 0 for several image sizes."
                )
            latent = self.token_mixing(latent.transpose(1, 2)).transpose(1, 2)  # (B, N, C)
        return self.proj_out(latent)


class AuxiliaryDecoder(nn.Module):
    """
    A shallow decoder of the library's own design that predicts one target's features at every patch. It exists in
    training only and is never saved with the tokenizer.

    Args:
        feature_dim (`int`): Features per patch, `D`.
        latent_channels (`int`): Channels of a latent token.
        num_latent_tokens (`int`): Number of latent tokens; 0 means one per patch, which needs `modulated=False`.
        grid_size (`tuple[int, int]`): Rows and columns of patches the decoder is built for.
        hidden_size (`int`, *optional*, defaults to 192): Width (192 in the released configuration).
        num_layers (`int`, *optional*, defaults to 3): Blocks (MAETok, table 5: 3 is best); 0 is a [`LinearDecoder`],
            on which the arguments that shape blocks have no effect.
        num_attention_heads (`int`, *optional*, defaults to 3): Attention heads.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Hidden width of the MLPs over `hidden_size`.
        position_embedding (`str`, *optional*, defaults to `"rope"`): `"rope"` or `"absolute"`.
        rope_theta (`float`, *optional*, defaults to 10.0): Base of the rotary frequencies.
        modulated (`bool`, *optional*, defaults to `True`): Whether the latents modulate the decoder, as in the
            released configuration.
        class_token (`bool`, *optional*, defaults to `True`): Whether a class token leads the sequence.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-5): Initial LayerScale of the plain form.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of the initial tokens.

    Raises:
        ValueError: If a size is not positive, the heads do not divide the width, or `modulated` is combined with
            `num_latent_tokens=0`.
    """

    def __init__(
        self,
        feature_dim: int,
        latent_channels: int,
        num_latent_tokens: int,
        grid_size: tuple[int, int],
        hidden_size: int = 192,
        num_layers: int = 3,
        num_attention_heads: int = 3,
        mlp_ratio: float = 4.0,
        position_embedding: str = "rope",
        rope_theta: float = 10.0,
        modulated: bool = True,
        class_token: bool = True,
        layer_scale_init_value: float = 1e-5,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        if num_layers < 0:
            raise ValueError(f"`num_layers` must not be negative, got {num_layers}; 0 is a linear decoder.")
        sizes = {"feature_dim": feature_dim, "hidden_size": hidden_size, "num_attention_heads": num_attention_heads}
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if hidden_size % num_attention_heads or hidden_size // num_attention_heads % 4:
            raise ValueError(
                f"`hidden_size` ({hidden_size}) must be `num_attention_heads` ({num_attention_heads}) heads of equal "
                f"size, a multiple of 4; it gives heads of {hidden_size / num_attention_heads:g} channels."
            )

        self.feature_dim = feature_dim
        if num_layers == 0:
            self.decoder = LinearDecoder(feature_dim, latent_channels, num_latent_tokens, grid_size)
        else:
            self.decoder = ViTDecoder(
                out_features=feature_dim,
                latent_channels=latent_channels,
                num_latent_tokens=num_latent_tokens,
                grid_size=grid_size,
                hidden_size=hidden_size,
                num_layers=num_layers,
                num_attention_heads=num_attention_heads,
                mlp_ratio=mlp_ratio,
                position_embedding=position_embedding,
                rope_theta=rope_theta,
                modulated=modulated,
                class_token=class_token,
                layer_scale_init_value=layer_scale_init_value,
                initializer_range=initializer_range,
            )

    @classmethod
    def from_tokenizer_config(
        cls,
        config: Mapping[str, Any],
        feature_dim: int,
        hidden_size: int = 192,
        num_layers: int = 3,
        num_attention_heads: int = 3,
    ) -> "AuxiliaryDecoder":
        """
        The auxiliary decoder that fits a tokenizer: its latents, patches and kind of positions. It is modulated,
        unless the latents are image tokens, which only the plain form can read.

        Args:
            config (`Mapping[str, Any]`): Config of the [`AutoencoderMAE`].
            feature_dim (`int`): Features per patch of the target.
            hidden_size, num_layers, num_attention_heads (`int`): See [`AuxiliaryDecoder`].

        Returns:
            [`AuxiliaryDecoder`]: With fresh weights.

        Raises:
            ValueError: If a size is invalid.
        """
        return cls(
            feature_dim=feature_dim,
            latent_channels=config["latent_channels"],
            num_latent_tokens=config["num_latent_tokens"],
            grid_size=(config["sample_size"] // config["patch_size"],) * 2,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            position_embedding=config["position_embedding"],
            rope_theta=config["rope_theta"],
            modulated=config["num_latent_tokens"] > 0,
            layer_scale_init_value=config["layer_scale_init_value"],
            initializer_range=config["initializer_range"],
        )

    def forward(self, latent: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Args:
            latent (`torch.Tensor` of shape `(batch_size, num_latent_tokens or N, latent_channels)`): Raw latents.
            grid (`tuple[int, int]`, *optional*): Rows and columns of patches; defaults to `grid_size`.

        Returns:
            `torch.Tensor` of shape `(batch_size, rows * columns, feature_dim)`, patches in row-major order.

        Raises:
            ValueError: If the decoder is linear and `grid` is not the one it is built for.
        """
        return self.decoder(latent, grid)
