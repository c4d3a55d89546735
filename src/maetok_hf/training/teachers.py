"""Features of frozen vision models as targets of the auxiliary decoders: DINOv2, SigLIP (MAETok, section 3.2)."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .targets import check_feature_loss, explained_loading, patch_grid


logger = logging.getLogger(__name__)

# By kind: the model types of transformers it stands for, and the statistics of the published checkpoints
_MODEL_TYPES = {"dinov2": ("dinov2", "dinov2_with_registers"), "siglip": ("siglip", "siglip_vision_model")}
_STATISTICS = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


class TeacherTarget(nn.Module):
    """
    The features that a frozen model gives of every patch of the clean image.

    The teacher sees the image with its own statistics and in its own patch size: where that is not the tokenizer's,
    the image is resized (bicubic, antialiased, overshoots clipped) by the ratio of the two, so that one teacher patch
    covers one tokenizer patch. Patches of 14 pixels against 16 turn 256 pixels into 224 and 512 into 448. Resizing and
    normalisation are in float32, the teacher in `dtype`, whatever autocast says. The teacher stays frozen and in
    evaluation mode, whatever `.train()` says.

    Args:
        teacher (`Callable[[torch.Tensor], torch.Tensor]`):
            Maps normalised images `(batch_size, 3, height, width)` in `dtype` to patch features `(batch_size, N, D)`
            in row-major order. A `nn.Module` is frozen, put in evaluation mode and cast to `dtype`, in place.
        feature_dim (`int`):
            Features per patch, `D`.
        teacher_patch_size (`int`):
            Side of the teacher's patches in pixels.
        image_mean (`Sequence[float]`):
            Mean of each colour that the teacher was trained with, for images in `[0, 1]`.
        image_std (`Sequence[float]`):
            Standard deviation of each colour that the teacher was trained with.
        patch_size (`int`, *optional*, defaults to 16):
            Side of the tokenizer's patches in pixels.
        feature_loss (`str`, *optional*, defaults to `"cosine"`):
            How predictions are compared with the features, see [`~maetok_hf.training.targets.feature_loss`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Floating-point type of the teacher's weights and input.

    Raises:
        ValueError: If a size is not positive, the statistics are not three numbers each, a standard deviation is not
            positive, `feature_loss` is unknown or `dtype` is no floating-point type.
    """

    def __init__(
        self,
        teacher: Callable[[torch.Tensor], torch.Tensor],
        feature_dim: int,
        teacher_patch_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        patch_size: int = 16,
        feature_loss: str = "cosine",
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__()
        sizes = {"feature_dim": feature_dim, "teacher_patch_size": teacher_patch_size, "patch_size": patch_size}
        for name, value in sizes.items():
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        for name, values in {"image_mean": image_mean, "image_std": image_std}.items():
            if len(values) != 3:
                raise ValueError(f"`{name}` must be three numbers, one for each colour, got {values!r}.")
        if not all(value > 0 for value in image_std):
            raise ValueError(f"`image_std` must be positive, got {image_std!r}.")
        check_feature_loss(feature_loss)
        if not dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating-point type, got {dtype}.")

        self.feature_dim = feature_dim
        self.teacher_patch_size = teacher_patch_size
        self.patch_size = patch_size
        self.feature_loss = feature_loss
        self.dtype = dtype
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).to(dtype)
        self.teacher = teacher
        # what is left of [-1, 1] -> [0, 1] -> (x - mean) / std: x * scale + shift
        mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (image_mean, image_std))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> "TeacherTarget":
        """Like `nn.Module.train`, but it stays in evaluation mode."""
        return super().train(False)

    def extra_repr(self) -> str:
        return (
            f"feature_dim={self.feature_dim}, teacher_patch_size={self.teacher_patch_size}, patch_size="
            f"{self.patch_size}, feature_loss={self.feature_loss!r}, dtype={self.dtype}"
        )

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Clean images in `[-1, 1]`.

        Returns:
            `torch.Tensor` of shape `(batch_size, N, feature_dim)`: As the teacher gives them, usually in `dtype`, for
            the tokenizer's patches in row-major order.

        Raises:
            ValueError: If the images do not have three channels or are not a whole number of the tokenizer's patches,
                or if the teacher does not give one vector of `feature_dim` numbers per patch.
        """
        rows, columns = patch_grid(pixel_values, self.patch_size)
        with torch.autocast(pixel_values.device.type, enabled=False):
            pixel_values = pixel_values.float()
            if self.teacher_patch_size != self.patch_size:
                size = (rows * self.teacher_patch_size, columns * self.teacher_patch_size)
                pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True).clamp(-1, 1)
            features = self.teacher((pixel_values * self.scale + self.shift).to(self.dtype))

        expected = (pixel_values.shape[0], rows * columns, self.feature_dim)
        if not isinstance(features, torch.Tensor) or features.shape != expected:
            given = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"`teacher` must give a tensor of shape {expected}, one vector for each of {rows} x {columns} patches "
                f"and no other tokens, got {given}: check `feature_dim` and `teacher_patch_size`, and drop class and "
                "register tokens."
            )
        return features


class _PatchTokens(nn.Module):
    """The patch tokens of a vision transformer of transformers, after its final norm."""

    def __init__(self, model: nn.Module, num_prefix_tokens: int, **options: Any):
        super().__init__()
        self.model = model
        self.num_prefix_tokens = num_prefix_tokens
        self.options = options

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values, **self.options).last_hidden_state[:, self.num_prefix_tokens :]


def load_teacher(
    kind: str,
    pretrained_model_name_or_path: str | os.PathLike,
    patch_size: int = 16,
    feature_loss: str = "cosine",
    dtype: torch.dtype = torch.bfloat16,
    revision: str | None = None,
) -> TeacherTarget:
    """
    A published vision model as a target: its patch tokens in the last layer, after the final norm.

    A named difference from the released code: where the patches of the teacher and of the tokenizer differ in size,
    the image is resized to an equal grid (256 to 224 pixels for patches of 14); that code resamples the weights of the
    patch embedding instead and shows the image at its full size.

    Weights are read from safetensors only. Class and register tokens are dropped, learned positions interpolated to
    the image, and parts that do not reach the patch tokens (SigLIP's text tower and pooling head) not loaded.
    Normalisation statistics are those of the repository's image processor; where it is known to have none, they are
    those of the published checkpoints of its kind, ImageNet's for DINOv2 and 0.5 for SigLIP, and a warning is logged.

    The released code of MAETok uses DINOv2-Large, `facebook/dinov2-large`, and SigLIP so400m,
    `google/siglip-so400m-patch14-224`; the paper says SigLIP-Large, `google/siglip-large-patch16-256`.

    Args:
        kind (`str`):
            `"dinov2"`, with or without registers, or `"siglip"`, which includes SigLIP 2 checkpoints of a fixed
            resolution and a SigLIP vision tower saved by itself.
        pretrained_model_name_or_path (`str` or `os.PathLike`):
            Folder or Hub repository.
        patch_size (`int`, *optional*, defaults to 16):
            Side of the tokenizer's patches in pixels.
        feature_loss (`str`, *optional*, defaults to `"cosine"`):
            How predictions are compared with the features, see [`~maetok_hf.training.targets.feature_loss`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Floating-point type of the teacher's weights and input.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub; by default the main branch.

    Returns:
        [`TeacherTarget`]: Frozen, with `feature_dim` of the model's width.

    Raises:
        OSError: If the model or its image processor cannot be found or read.
        ValueError: If `kind` or `feature_loss` is unknown, the model is of another kind or lacks weights, or its image
            processor does not say how to normalise images.
    """
    from transformers import AutoConfig, AutoModel

    if kind not in _MODEL_TYPES:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, _MODEL_TYPES))}, got {kind!r}.")
    check_feature_loss(feature_loss)
    place = {} if revision is None else {"revision": revision}
    with explained_loading(pretrained_model_name_or_path):
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **place)
    if config.model_type not in _MODEL_TYPES[kind]:
        raise ValueError(
            f"`pretrained_model_name_or_path` {os.fspath(pretrained_model_name_or_path)!r} is a model of type "
            f"{config.model_type!r}, but `kind` {kind!r} stands for {' or '.join(map(repr, _MODEL_TYPES[kind]))}."
        )
    num_prefix_tokens, options = 0, {}
    if kind == "dinov2":
        num_prefix_tokens = 1 + (config.num_register_tokens if config.model_type == "dinov2_with_registers" else 0)
    else:
        config = config.vision_config if config.model_type == "siglip" else config
        config.vision_use_head = False
        options["interpolate_pos_encoding"] = True

    with explained_loading(pretrained_model_name_or_path), _without_load_report():
        model, info = AutoModel.from_pretrained(
            pretrained_model_name_or_path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **place,
        )
    if info["missing_keys"]:
        raise ValueError(
            f"`pretrained_model_name_or_path` {os.fspath(pretrained_model_name_or_path)!r} lacks weights of its model "
            f"({', '.join(sorted(info['missing_keys'])[:3])}, ...): a teacher must be trained, download it again."
        )
    image_mean, image_std = _image_statistics(kind, pretrained_model_name_or_path, **place)
    return TeacherTarget(
        _PatchTokens(model, num_prefix_tokens, **options),
        feature_dim=config.hidden_size,
        teacher_patch_size=config.patch_size,
        image_mean=image_mean,
        image_std=image_std,
        patch_size=patch_size,
        feature_loss=feature_loss,
        dtype=dtype,
    )


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from listing every weight of a text tower as unexpected; missing ones are checked here."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _image_statistics(
    kind: str, pretrained_model_name_or_path: str | os.PathLike, **place: str
) -> tuple[Sequence[float], ...]:
    """Mean and standard deviation of the repository's image processor, or of the kind's published checkpoints."""
    from transformers import ImageProcessingMixin

    name = os.fspath(pretrained_model_name_or_path)
    with explained_loading(name):
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(name, **place)
        except OSError:
            # raised where there is no image processor and where it was not possible to look
            if not _lacks_image_processor(name, **place):
                raise
            settings = None
    if settings is None:
        logger.warning(
            "%s has no image processor that says how to normalise images: using mean %s and standard deviation %s, "
            "those of the published %s checkpoints.",
            name,
            *_STATISTICS[kind],
            kind,
        )
        return _STATISTICS[kind]
    for statistic in ("image_mean", "image_std"):
        if settings.get(statistic) is None:
            raise ValueError(
                f"the image processor of {name!r} has no `{statistic}`: write those that the teacher was trained with "
                f"into its `{PROCESSOR_FILES[0]}`."
            )
    return settings["image_mean"], settings["image_std"]


def _lacks_image_processor(name: str, **place: str) -> bool:
    """Whether a folder or repository is known to have no file of an image processor; `OSError` if that is unknown."""
    if os.path.isdir(name):
        return not any(os.path.isfile(os.path.join(name, file)) for file in PROCESSOR_FILES)
    return all(_is_known_to_be_missing(name, file, **place) for file in PROCESSOR_FILES)


def _is_known_to_be_missing(repository: str, file: str, **place: str) -> bool:
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if try_to_load_from_cache(repository, file, **place) is _CACHED_NO_EXIST:
        return True
    try:
        hf_hub_download(repository, file, **place)
    except LocalEntryNotFoundError:  # not here, and the Hub could not be asked
        raise
    except EntryNotFoundError:
        return True
    return False
