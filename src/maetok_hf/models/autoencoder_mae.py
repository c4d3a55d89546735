"""The MAETok tokenizer: images to a short sequence of continuous tokens and back."""

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DiagonalGaussianDistribution,
    EncoderOutput,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .embeddings import resample_position_embedding
from .model_card import ModelCardMixin, config_settings
from .vit import ViTDecoder, ViTEncoder, compile_blocks


POSITION_EMBEDDINGS = ("rope", "absolute")


_CARD_CODE = """\
import torch
from diffusers.utils import load_image
from maetok_hf import AutoencoderMAE
from maetok_hf.data import ImageTransform

vae = AutoencoderMAE.from_pretrained("{repo_id}")
pixels = ImageTransform(vae.config.sample_size)(load_image("image.png")).unsqueeze(0)  # in [-1, 1]
with torch.no_grad():
    latents = vae.encode(pixels).latent{posterior}
    reconstruction = vae.decode(latents).sample"""


class TokenGaussianDistribution(DiagonalGaussianDistribution):
    """
    A diagonal Gaussian over token sequences: diffusers' distribution with the moments along the last axis.

    Args:
        parameters (`torch.Tensor` of shape `(batch_size, num_latent_tokens, 2 * latent_channels)`): Mean, log
            variance.
        deterministic (`bool`, *optional*, defaults to `False`): Whether the variance is zero.
    """

    def __init__(self, parameters: torch.Tensor, deterministic: bool = False):
        # the base class splits along axis 1: give it the channels there, then turn every moment back
        super().__init__(parameters.transpose(1, 2), deterministic)
        self.parameters = parameters
        for name in ("mean", "logvar", "std", "var"):
            setattr(self, name, getattr(self, name).transpose(1, 2))

    def kl(self, other: "TokenGaussianDistribution | None" = None) -> torch.Tensor:
        """KL divergence to `other` or to the standard normal, in nats, summed over tokens and channels:
        `(batch_size,)`."""
        if self.deterministic:
            return torch.zeros(self.mean.shape[0], device=self.mean.device, dtype=self.mean.dtype)
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2))
        terms = ((self.mean - other.mean) ** 2 + self.var) / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * terms.sum(dim=(1, 2))

    def nll(self, sample: torch.Tensor, dims: tuple[int, ...] = (1, 2)) -> torch.Tensor:
        """Negative log likelihood of `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(self.mean.shape[0], device=self.mean.device, dtype=self.mean.dtype)
        terms = math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=dims)


class AutoencoderMAE(ModelCardMixin, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    r"""
    MAETok, the masked autoencoder as a 1D image tokenizer ([arXiv
    2502.03444](https://huggingface.co/papers/2502.03444)).

    A ViT encoder turns an image into `num_latent_tokens` tokens of `latent_channels` channels; a ViT decoder turns
    them back. Latents are raw: `normalize_latents` and `denormalize_latents` apply `latents_mean` and `latents_std`.

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods (loading,
    saving, moving, casting).

    Parameters:
        sample_size (`int`, *optional*, defaults to 256):
            Side in pixels of the images the model is built for. Other multiples of `patch_size`, non-square ones too,
            work: rotary positions extend by themselves, absolute tables are resampled.
        patch_size (`int`, *optional*, defaults to 16): Side of a patch in pixels.
        in_channels (`int`, *optional*, defaults to 3): Channels of the images.
        out_channels (`int`, *optional*, defaults to 3): Channels of the reconstructions.
        latent_channels (`int`, *optional*, defaults to 32): Channels of a latent token.
        num_latent_tokens (`int`, *optional*, defaults to 128):
            Number of learned latent tokens. 0 makes the image tokens themselves the latents, one per patch (the
            ablation of section 4.4); the decoder must then be the plain one.
        hidden_size (`int`, *optional*, defaults to 768): Width of the encoder.
        num_layers (`int`, *optional*, defaults to 12): Blocks of the encoder.
        num_attention_heads (`int`, *optional*, defaults to 12): Attention heads of the encoder.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Hidden width of the encoder's MLPs over `hidden_size`.
        decoder_hidden_size (`int`, *optional*): Width of the decoder; the encoder's if `None`.
        decoder_num_layers (`int`, *optional*): Blocks of the decoder; the encoder's if `None`.
        decoder_num_attention_heads (`int`, *optional*): Attention heads of the decoder; the encoder's if `None`.
        decoder_mlp_ratio (`float`, *optional*): MLP ratio of the decoder; the encoder's if `None`.
        position_embedding (`str`, *optional*, defaults to `"rope"`):
            `"rope"` (mixed 2D rotary positions on the image tokens, next to the encoder's absolute table) or
            `"absolute"` (learned absolute tables only).
        rope_theta (`float`, *optional*, defaults to 10.0): Base of the initial rotary frequencies.
        modulated_decoder (`bool`, *optional*, defaults to `False`):
            Whether the latents also scale and shift the decoder's latent tokens after every norm (the authors' `movq`
            models).
        encoder_class_token (`bool`, *optional*, defaults to `True`): Whether the encoder has a class token.
        decoder_class_token (`bool`, *optional*, defaults to `True`): Whether the decoder has a class token.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-5): Initial LayerScale of every residual branch.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial tokens and position tables. Short runs want more, for example 0.5.
        decoder_drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth of the decoder, in training
            only.
        gaussian_posterior (`bool`, *optional*, defaults to `False`):
            Whether `encode` returns a Gaussian posterior (`latent_dist`) as [`AutoencoderKL`] does: the KL-VAE
            baseline.
        latents_mean (`float` or `list[float]`, *optional*): Mean of the raw latents, one value or one per channel.
        latents_std (`float` or `list[float]`, *optional*): Standard deviation of the raw latents, as `latents_mean`.

    Raises:
        ValueError: If sizes do not fit each other; the message names the argument, its value and the relation.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    # rotary frequencies are multiplied by positions: in bfloat16, far tokens would be turned by a tenth of a radian
    _keep_in_fp32_modules = ["freqs"]
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        num_latent_tokens: int = 128,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        decoder_hidden_size: int | None = None,
        decoder_num_layers: int | None = None,
        decoder_num_attention_heads: int | None = None,
        decoder_mlp_ratio: float | None = None,
        position_embedding: str = "rope",
        rope_theta: float = 10.0,
        modulated_decoder: bool = False,
        encoder_class_token: bool = True,
        decoder_class_token: bool = True,
        layer_scale_init_value: float = 1e-5,
        initializer_range: float = 0.02,
        decoder_drop_path_rate: float = 0.0,
        gaussian_posterior: bool = False,
        latents_mean: float | list[float] | None = None,
        latents_std: float | list[float] | None = None,
    ):
        super().__init__()
        decoder_hidden_size = hidden_size if decoder_hidden_size is None else decoder_hidden_size
        decoder_num_layers = num_layers if decoder_num_layers is None else decoder_num_layers
        decoder_mlp_ratio = mlp_ratio if decoder_mlp_ratio is None else decoder_mlp_ratio
        if decoder_num_attention_heads is None:
            decoder_num_attention_heads = num_attention_heads

        self._check_config(
            positive={
                "sample_size": sample_size,
                "patch_size": patch_size,
                "in_channels": in_channels,
                "out_channels": out_channels,
                "latent_channels": latent_channels,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "num_attention_heads": num_attention_heads,
                "decoder_hidden_size": decoder_hidden_size,
                "decoder_num_layers": decoder_num_layers,
                "decoder_num_attention_heads": decoder_num_attention_heads,
                "mlp_ratio": mlp_ratio,
                "decoder_mlp_ratio": decoder_mlp_ratio,
                "rope_theta": rope_theta,
                "initializer_range": initializer_range,
            },
        )
        if sample_size % patch_size != 0:
            raise ValueError(f"`sample_size` ({sample_size}) must be a multiple of `patch_size` ({patch_size}).")
        if num_latent_tokens < 0:
            raise ValueError(f"`num_latent_tokens` must be 0 (image tokens) or more, got {num_latent_tokens}.")
        if position_embedding not in POSITION_EMBEDDINGS:
            raise ValueError(f"`position_embedding` must be one of {POSITION_EMBEDDINGS}, got {position_embedding!r}.")
        if modulated_decoder and num_latent_tokens == 0:
            raise ValueError(
                "`modulated_decoder=True` needs `num_latent_tokens` > 0: image tokens take the plain decoder."
            )
        if not 0 <= decoder_drop_path_rate < 1:
            raise ValueError(f"`decoder_drop_path_rate` must lie in [0, 1), got {decoder_drop_path_rate}.")
        for prefix, width, heads in (
            ("", hidden_size, num_attention_heads),
            ("decoder_", decoder_hidden_size, decoder_num_attention_heads),
        ):
            if width % heads != 0 or (position_embedding == "rope" and width // heads % 4 != 0):
                raise ValueError(
                    f"`{prefix}hidden_size` ({width}) must be `{prefix}num_attention_heads` ({heads}) heads of "
                    f"equal size, "
                    f"a multiple of 4 with rotary positions; it gives heads of {width / heads:g} channels."
                )
        for name, value, positive in (
            ("latents_mean", latents_mean, False),
            ("latents_std", latents_std, True),
        ):
            values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
            if isinstance(value, (list, tuple)) and len(value) != latent_channels:
                raise ValueError(
                    f"`{name}` must be a number or have one value per latent channel ({latent_channels}), "
                    f"got {len(value)} values."
                )
            # a config is JSON: a tensor or an array would be accepted here and fail at `save_pretrained`
            plain = all(isinstance(v, (int, float)) for v in values)
            if not plain or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
                raise ValueError(
                    f"`{name}` must be a float or a list of floats, finite{' and positive' if positive else ''}, "
                    f"got {value!r}."
                )

        grid_size = (sample_size // patch_size,) * 2
        self.encoder = ViTEncoder(
            in_channels=in_channels,
            patch_size=patch_size,
            out_channels=2 * latent_channels if gaussian_posterior else latent_channels,
            num_latent_tokens=num_latent_tokens,
            grid_size=grid_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            position_embedding=position_embedding,
            rope_theta=rope_theta,
            class_token=encoder_class_token,
            layer_scale_init_value=layer_scale_init_value,
            initializer_range=initializer_range,
        )
        self.decoder = ViTDecoder(
            out_features=patch_size * patch_size * out_channels,
            latent_channels=latent_channels,
            num_latent_tokens=num_latent_tokens,
            grid_size=grid_size,
            hidden_size=decoder_hidden_size,
            num_layers=decoder_num_layers,
            num_attention_heads=decoder_num_attention_heads,
            mlp_ratio=decoder_mlp_ratio,
            position_embedding=position_embedding,
            rope_theta=rope_theta,
            modulated=modulated_decoder,
            class_token=decoder_class_token,
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=decoder_drop_path_rate,
            initializer_range=initializer_range,
        )
        self.use_slicing = False

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compile the transformer blocks of encoder and decoder, for each one graph for the last and one for the others:
        see [`ModelMixin.compile_repeated_blocks`].

        Args:
            args, kwargs: Passed on to `torch.compile`.
        """
        compile_blocks(self.encoder, *args, **kwargs)
        compile_blocks(self.decoder, *args, **kwargs)

    @torch.no_grad()
    def set_sample_size(self, sample_size: int) -> None:
        """
        Build a trained model for images of another size, which `decode` gives from then on. Absolute tables are
        resampled to it once and for all: results for images of the new size stay what they were, those for the old
        size change a little. Config entry `sample_size` follows.

        Args:
            sample_size (`int`): Side in pixels.

        Raises:
            ValueError: If it is not a positive multiple of `patch_size`.
        """
        patch_size = self.config.patch_size
        if sample_size <= 0 or sample_size % patch_size != 0:
            raise ValueError(
                f"`sample_size` must be a positive multiple of `patch_size` ({patch_size}), got {sample_size}."
            )
        grid = (sample_size // patch_size,) * 2
        for vit in (self.encoder, self.decoder):
            if vit.pos_embed is not None:
                table = resample_position_embedding(vit.pos_embed, vit.grid_size, grid, vit.num_prefix_tokens)
                vit.pos_embed = nn.Parameter(table, requires_grad=vit.pos_embed.requires_grad)
            vit.grid_size = grid
        self.register_to_config(sample_size=sample_size)

    @staticmethod
    def _check_config(positive: dict[str, float]) -> None:
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @property
    def latent_sequence_length(self) -> int:
        """`int`: Latent tokens of an image of `sample_size`: `num_latent_tokens`, or one per patch when that is 0."""
        grid = self.config.sample_size // self.config.patch_size
        return self.config.num_latent_tokens or grid * grid

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        patch_size = self.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size <= 0 or size % patch_size != 0:
                raise ValueError(
                    f"image {name} must be a positive multiple of `patch_size` ({patch_size}), got {size}."
                )
        return height // patch_size, width // patch_size

    def _check_mask(self, mask: torch.Tensor, sample: torch.Tensor) -> None:
        rows, columns = self._grid(*sample.shape[-2:])
        expected = (sample.shape[0], rows * columns)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"`mask` must be a bool tensor of shape {expected} (batch, patches), True where a patch is replaced; "
                f"got {mask.dtype} of shape {tuple(mask.shape)}."
            )

    def _encode(self, sample: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if not self.use_slicing or sample.shape[0] <= 1:
            return self.encoder(sample, mask)
        masks = [None] * sample.shape[0] if mask is None else mask.split(1)
        return torch.cat([self.encoder(s, m) for s, m in zip(sample.split(1), masks, strict=True)])

    @apply_forward_hook
    def encode(
        self, sample: torch.Tensor, mask: torch.Tensor | None = None, return_dict: bool = True
    ) -> EncoderOutput | AutoencoderKLOutput | tuple:
        """
        Encode images into raw latents.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                Images with values in `[-1, 1]`; height and width are multiples of `patch_size`.
            mask (`torch.BoolTensor` of shape `(batch_size, height / patch_size * width / patch_size)`, *optional*):
                True where a patch is replaced by the mask token (mask modelling, MAETok section 3.2).
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`EncoderOutput`] with `latent` of shape `(batch_size, num_latent_tokens, latent_channels)`, or with
            `gaussian_posterior` [`AutoencoderKLOutput`] with `latent_dist`; a 1-tuple of it if `return_dict` is
            `False`.

        Raises:
            ValueError: If the image's channels or size, or the mask's type or shape, do not fit.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"`sample` must have shape (batch, {self.config.in_channels}, height, width), "
                f"got {tuple(sample.shape)}."
            )
        self._grid(*sample.shape[-2:])
        if mask is not None:
            self._check_mask(mask, sample)

        encoded = self._encode(sample, mask)
        if self.config.gaussian_posterior:
            posterior = TokenGaussianDistribution(encoded)
            return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)
        return EncoderOutput(latent=encoded) if return_dict else (encoded,)

    def _decode(self, latent: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        (rows, columns), side, channels = grid, self.config.patch_size, self.config.out_channels
        patches = self.decoder(latent, grid)  # (B, rows * columns, side * side * channels)
        patches = patches.reshape(-1, rows, columns, side, side, channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, rows * side, columns * side)

    @apply_forward_hook
    def decode(
        self, latent: torch.Tensor, height: int | None = None, width: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple:
        """
        Decode raw latents into images.

        Args:
            latent (`torch.Tensor` of shape `(batch_size, num_latent_tokens, latent_channels)`): Raw latents.
            height, width (`int`, *optional*): Size of the images in pixels; `sample_size` by default.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.

        Returns:
            [`DecoderOutput`] with `sample` of shape `(batch_size, out_channels, height, width)`: images in `[-1, 1]`
            but for the decoder's overshoot (not clamped); a 1-tuple of it if `return_dict` is `False`.

        Raises:
            ValueError: If the latents' shape or the image size do not fit.
        """
        grid = self._grid(
            self.config.sample_size if height is None else height, self.config.sample_size if width is None else width
        )
        expected = (self.config.num_latent_tokens or grid[0] * grid[1], self.config.latent_channels)
        if latent.ndim != 3 or tuple(latent.shape[1:]) != expected:
            raise ValueError(
                f"`latent` must have shape (batch, {expected[0]}, {expected[1]}), got {tuple(latent.shape)}."
            )

        if self.use_slicing and latent.shape[0] > 1:
            decoded = torch.cat([self._decode(part, grid) for part in latent.split(1)])
        else:
            decoded = self._decode(latent, grid)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)

    def forward(
        self,
        sample: torch.Tensor,
        mask: torch.Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple:
        """
        Reconstruct images: encode, then decode at the same size.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in `[-1, 1]`.
            mask (`torch.BoolTensor`, *optional*): See [`~AutoencoderMAE.encode`].
            sample_posterior (`bool`, *optional*, defaults to `False`):
                Whether to sample a Gaussian posterior instead of taking its mode.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            generator (`torch.Generator`, *optional*): Source of the posterior's noise.

        Returns:
            [`DecoderOutput`] with `sample` of the shape of the input; a 1-tuple of it if `return_dict` is `False`.

        Raises:
            ValueError: If an input does not fit, or `sample_posterior` is asked of a model without a posterior.
        """
        if sample_posterior and not self.config.gaussian_posterior:
            raise ValueError("`sample_posterior=True` needs a model with `gaussian_posterior=True`.")
        encoded = self.encode(sample, mask, return_dict=False)[0]
        if self.config.gaussian_posterior:
            encoded = encoded.sample(generator) if sample_posterior else encoded.mode()
        height, width = sample.shape[-2:]
        return self.decode(encoded, height, width, return_dict=return_dict)

    def _card_facts(self, repo_id: str) -> dict[str, Any]:
        config = self.config
        tokens = config.num_latent_tokens or "one per patch"
        posterior = "_dist.mode()" if config.gaussian_posterior else ""
        return {
            "summary": (
                f"A one-dimensional image tokenizer (`{type(self).__name__}`): an autoencoder that turns an image of "
                f"{config.sample_size} pixels into tokens ({tokens}) of {config.latent_channels} channels, for "
                "diffusion models to generate."
            ),
            "code": _CARD_CODE.format(repo_id=repo_id, posterior=posterior),
            "settings": config_settings(self),
            "limits": [
                "Images unlike the training data are reconstructed less well, small text and faces first.",
                "The latents carry the biases of the training data into every model that is trained on them.",
            ],
            "tags": ["image-tokenizer", "autoencoder"],
            "pipeline_tag": "image-feature-extraction",
        }
