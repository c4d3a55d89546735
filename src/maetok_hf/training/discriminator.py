"""
The discriminator: spectral-norm heads on the features of a frozen DINO vision transformer (MAETok, arXiv 2502.03444;
the design is that of StyleGAN-T, arXiv 2301.09515).

Differences from the code released with MAETok:

- Heads normalise with `GroupNorm` (up to 32 groups) where that code has a batch norm over groups of 8 images: here the
  logits of an image do not depend on the other images of its batch, and so not on how a step is cut into batches.
- Images are resized by antialiased bicubic interpolation, or a window of them is taken, by `input_mode`; that code
  draws one of the two for each batch from a global random state.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from .diffaugment import take_windows


DEFAULT_TRUNK = "vit_small_patch16_224.dino"
INPUT_MODES = ("resize", "crop")
NUM_TAPS = 4


class Discriminator(nn.Module):
    """
    Judges images: one logit for every patch of five feature maps of a frozen vision transformer, those of its
    embedding and after each quarter of its blocks (3, 6, 9 and 12 of 12). In a feature map the class token is added to
    every patch token; then a head of its own reads it: 1D convolutions with spectral norm over the patches in
    row-major order, of kernel 1, 9 (residual) and 1.

    The trunk is frozen, in evaluation mode and *no submodule*: it is in no `state_dict`, in no `parameters()`, and
    neither DDP nor FSDP wrap it. `.to()` therefore does not move it: call [`Discriminator.move_frozen`]. It runs under
    the caller's autocast. The heads always run in float32, because the power iteration of the spectral norm and
    differences of logits do not survive low precision.

    The spectral norm makes one power iteration for each forward pass in training mode, from the weights alone, never
    from data: processes agree without talking. But a process that accumulates two micro-batches iterates twice per
    optimiser step where two processes with one micro-batch each iterate once. Their estimates of the norm, and with
    them the logits, then differ slightly; this is the only statistic here that depends on how a step is cut.

    Args:
        trunk (`timm.models.VisionTransformer`): With a class token and at least four blocks, and the weights it shall
            have; see [`Discriminator.from_timm`]. Images are normalised by its own mean and standard deviation
            (ImageNet's, if it names none) and brought to its own image size.
        input_mode (`str`, *optional*, defaults to `"resize"`): `"resize"` resizes images to the trunk's image size,
            `"crop"` takes a window of that size from larger images, and resizes smaller ones.

    Raises:
        ValueError: If `input_mode` is unknown or `trunk` is no such vision transformer.
    """

    def __init__(self, trunk: nn.Module, input_mode: str = "resize"):
        super().__init__()
        if input_mode not in INPUT_MODES:
            raise ValueError(f"`input_mode` must be one of {', '.join(map(repr, INPUT_MODES))}, got {input_mode!r}.")
        _check_trunk(trunk)
        from timm.data import resolve_model_data_config

        self.input_mode = input_mode
        self.image_size = tuple(trunk.patch_embed.img_size)
        # a tuple is invisible to `nn.Module`
        self._frozen = (trunk.eval().requires_grad_(False),)
        depth = len(trunk.blocks)
        self.taps = tuple(math.ceil(depth * quarter / NUM_TAPS) for quarter in range(1, NUM_TAPS + 1))
        self.heads = nn.ModuleList(_Head(trunk.embed_dim) for _ in range(1 + NUM_TAPS))

        statistics = resolve_model_data_config(trunk)
        mean, std = (torch.tensor(statistics[name], dtype=torch.float32)[:, None, None] for name in ("mean", "std"))
        # statistics of values in [0, 1], here of values in [-1, 1]
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)

    @classmethod
    def from_timm(
        cls, name: str = DEFAULT_TRUNK, input_mode: str = "resize", image_size: int | None = None
    ) -> "Discriminator":
        """
        A discriminator with fresh heads on a pretrained trunk.

        Args:
            name (`str`, *optional*, defaults to `"vit_small_patch16_224.dino"`):
                Model known to timm, `"hf-hub:owner/name"`, or `"local-dir:/path"` of a folder with weights and the
                `config.json` of timm.
            input_mode (`str`, *optional*, defaults to `"resize"`): See [`Discriminator`].
            image_size (`int`, *optional*): Side of the images that the trunk sees, if not the one it was trained with:
                its position table is resampled. DINOv2 in timm is built for 518 pixels, the paper uses 224.

        Returns:
            [`Discriminator`]: On the CPU.

        Raises:
            ValueError: If the model is no vision transformer with a class token.
            OSError: If timm knows no such model, or its weights cannot be loaded.
        """
        import timm

        try:
            trunk = timm.create_model(name, pretrained=True, num_classes=0, img_size=image_size)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"the trunk of the discriminator, {name!r}, could not be loaded: {error}. Without a network, copy its "
                "`config.json` and weights from the Hub into a folder and name it 'local-dir:/path/to/folder'."
            ) from error
        return cls(trunk, input_mode)

    @property
    def trunk(self) -> nn.Module:
        """The frozen vision transformer."""
        return self._frozen[0]

    def move_frozen(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Discriminator":
        """
        Move the trunk, which `.to()` does not reach.

        Args:
            device (`torch.device` or `str`): Device of the images to judge.
            dtype (`torch.dtype`, *optional*): Precision of its weights; unchanged by default. In `torch.bfloat16` it
                computes in bfloat16 whatever autocast says.

        Returns:
            [`Discriminator`]: Itself.
        """
        self.trunk.to(device=device, dtype=dtype)
        return self

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """
        Compile the blocks of the trunk. The heads stay as they are: their spectral norm changes state in every pass.

        Args:
            args, kwargs: Passed on to `torch.compile`.
        """
        for block in self.trunk.blocks:
            block.compile(*args, **kwargs)

    def forward(self, images: torch.Tensor, crop_draws: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images of any size in `[-1, 1]`.
            crop_draws (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): Numbers in `[0, 1)`, the top and left
                of the window as a fraction of the room there is; needed with, and only with, `input_mode="crop"`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, 5 * N)` for `N` patches of the trunk: logits, high for images
            that look real.

        Raises:
            ValueError: If a shape is wrong, or `crop_draws` is missing or superfluous.
        """
        features = self._features(self._fit(images, crop_draws))
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([head(feature.float()) for head, feature in zip(self.heads, features, strict=True)], 1)

    def judge(self, images: torch.Tensor, crop_draws: torch.Tensor | None = None) -> torch.Tensor:
        """
        The logits of `forward`, for the step of the tokenizer: gradients flow to the images and not to the heads, and
        nothing of the discriminator changes. In training mode the power iteration runs on a copy of its vectors. Call
        it on the module itself, also where DDP wraps it for its own step.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): See `forward`.
            crop_draws (`torch.Tensor` of shape `(batch_size, 2)`, *optional*): See `forward`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, 5 * N)`.

        Raises:
            ValueError: See `forward`.
        """
        state = {name: parameter.detach() for name, parameter in self.named_parameters()}
        state |= {name: buffer.clone() for name, buffer in self.named_buffers()}
        return torch.func.functional_call(self, state, (images, crop_draws))

    def _fit(self, images: torch.Tensor, crop_draws: torch.Tensor | None) -> torch.Tensor:
        """Images as the trunk wants them: of its size and statistics."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"`images` must have shape (batch_size, 3, height, width), got {tuple(images.shape)}.")
        self._check_crop_draws(crop_draws, images.shape[0])
        height, width = self.image_size
        images = images.float()
        if crop_draws is not None and images.shape[-2] >= height and images.shape[-1] >= width:
            images = take_windows(images, crop_draws, height, width)
        elif tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", align_corners=False, antialias=True)
        return (images - self.mean) / self.std

    def _check_crop_draws(self, crop_draws: torch.Tensor | None, batch_size: int) -> None:
        if (self.input_mode == "crop") != (crop_draws is not None):
            raise ValueError(
                "`crop_draws` is needed with `input_mode='crop'`: draw two numbers in [0, 1) for each image."
                if crop_draws is None
                else f"`crop_draws` has no meaning with `input_mode={self.input_mode!r}`: leave it out."
            )
        if crop_draws is not None and crop_draws.shape != (batch_size, 2):
            raise ValueError(f"`crop_draws` must have shape {(batch_size, 2)}, got {tuple(crop_draws.shape)}.")

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Patch tokens plus class token of each tap, of shape `(batch_size, width, N)`."""
        trunk = self.trunk
        # the public `forward_intermediates` gives what the blocks return, but not what the first one is given
        tokens = trunk.patch_embed(images.to(trunk.cls_token.dtype))
        tokens = trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(tokens)))
        features = [tokens]
        for index, block in enumerate(trunk.blocks, start=1):
            tokens = block(tokens)
            if index in self.taps:
                features.append(tokens)
        return [(feature[:, trunk.num_prefix_tokens :] + feature[:, :1]).transpose(1, 2) for feature in features]


class _Head(nn.Module):
    """One logit per token, from `(batch_size, width, N)` to `(batch_size, N)`."""

    def __init__(self, width: int):
        super().__init__()
        self.project = _ConvNorm(width, 1)
        self.mix = _ConvNorm(width, 9)
        self.logit = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.project(tokens)
        # a sum of two independent terms, brought back to the variance of one
        tokens = (tokens + self.mix(tokens)) * math.sqrt(0.5)
        return self.logit(tokens).squeeze(1)


class _ConvNorm(nn.Sequential):
    """Convolution with spectral norm, norm over one sample, activation. The row of tokens is closed to a ring."""

    def __init__(self, width: int, kernel_size: int):
        conv = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, padding_mode="circular")
        norm = nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)
        super().__init__(spectral_norm(conv), norm, nn.LeakyReLU(0.2))


def _check_trunk(trunk: nn.Module) -> None:
    from timm.models import VisionTransformer

    if not isinstance(trunk, VisionTransformer):
        raise ValueError(f"`trunk` must be a vision transformer of timm, got {type(trunk).__name__}.")
    if trunk.cls_token is None:
        raise ValueError("`trunk` must have a class token: the heads add it to the patch tokens.")
    if len(trunk.blocks) < NUM_TAPS:
        raise ValueError(f"`trunk` must have at least {NUM_TAPS} blocks, got {len(trunk.blocks)}.")
