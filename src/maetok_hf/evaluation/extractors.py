"""From 8-bit images to features: Inception by torch-fidelity, DINOv2 by transformers, or any other network."""

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .extras import needing
from .statistics import Moments, load_moments


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
# of the map that ADM's suite takes for sFID: 7 of 192 channels of 17 x 17
SPATIAL_CHANNELS = 7
DINOV2_SIZE = 224
DEFAULT_DINOV2 = "facebook/dinov2-large"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureExtractor(Protocol):
    """
    Anything that can be called with uint8 images of shape `(n, 3, height, width)` and gives a dict of features, each
    of shape `(n, dim)`: `"pool"`, and if it has them `"spatial"` and `"logits"`. What changes its numbers is named by
    three texts, which are part of an evaluation's protocol.

    Attributes:
        name: What it is.
        digest: Changes with any weight.
        resize: How it brings images to its size.
    """

    name: str
    digest: str
    resize: str

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]: ...


class InceptionExtractor(nn.Module):
    """
    Inception of ADM's suite and of the original FID, as torch-fidelity has it: `"pool"` of 2048 numbers (FID, KID,
    precision, recall), `"spatial"` of 2023 (sFID), `"logits"` of 1008 without the bias (Inception Score).

    Spatial features are the first 7 channels of a 17 x 17 map in the middle, in the order (row, column, channel) of
    ADM's reference files. They follow ADM's graph by name, but no number of ADM has been reproduced with them yet.

    It computes in float32, without TF32, whatever autocast says.

    Args:
        network (`torch_fidelity.FeatureExtractorInceptionV3`): For `"2048"` and `"logits_unbiased"`; see
            [`InceptionExtractor.from_file`].
        digest (`str`): Of its weights.
    """

    name = "inception-v3 (torch-fidelity, 2015-12-05)"
    resize = "bilinear of TensorFlow 1 to 299"

    def __init__(self, network: nn.Module, digest: str):
        super().__init__()
        self.network, self.digest = network.requires_grad_(False).eval(), digest
        self._spatial: torch.Tensor | None = None
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @classmethod
    def from_file(cls, path: str | Path | None = None) -> "InceptionExtractor":
        """
        The network with the published weights.

        Args:
            path (`str` or `Path`, *optional*): Their file. By default it is looked for where torch-fidelity keeps it,
                `checkpoints` in the folder of `torch.hub`, and downloaded there once.

        Returns:
            [`InceptionExtractor`]: On the CPU. Its digest is the SHA-256 of the file.

        Raises:
            ImportError: If torch-fidelity is not installed.
            OSError: If the file is not there and cannot be downloaded; says which file to put where.
            ValueError: If the file does not hold the weights of this network.
        """
        with needing("torch-fidelity"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = _inception_file(path)
        data = path.read_bytes()
        try:
            # torch-fidelity loads a file in a way that could run code in it: these bytes are known to hold tensors
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=io.BytesIO(data),
            )
        except Exception as error:  # unpickling raises many kinds
            raise ValueError(
                f"{path} does not hold the weights of Inception ({type(error).__name__}: {str(error)[:200]}): remove "
                f"it, and download {INCEPTION_URL}."
            ) from error
        return cls(network, hashlib.sha256(data).hexdigest())

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.ByteTensor` of shape `(n, 3, height, width)`): On any device.

        Returns:
            `dict[str, torch.Tensor]`: `"pool"`, `"spatial"` and `"logits"` in float32, on the network's device.

        Raises:
            ValueError: If the images are not 8-bit colour images.
        """
        images = _on_device(images, self)
        with full_float32(images.device):
            pool, logits = self.network(images)
        spatial, self._spatial = self._spatial, None
        return {"pool": pool, "spatial": spatial, "logits": logits}

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        # what follows works on the map in place
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).clone()


def _inception_file(path: str | Path | None) -> Path:
    if path is not None:
        if not Path(path).is_file():
            raise OSError(f"`path` {os.fspath(path)!r} is no file: download {INCEPTION_URL} and put it there.")
        return Path(path)
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), progress=False)
        except OSError as error:
            raise OSError(
                f"the weights of Inception could not be downloaded: {error}. Without a network, download "
                f"{INCEPTION_URL} elsewhere and put it into {path.parent} as {INCEPTION_FILE}, or name the file with "
                "`path`."
            ) from error
    return path


class DINOv2Extractor(nn.Module):
    """
    The class token of a DINOv2 of transformers after its final norm, `"pool"`: FD-DINOv2 (Stein et al., arXiv
    2306.04675), which agrees better with human judgement than FID.

    It computes in float32, without TF32, whatever autocast says.

    Args:
        model (`transformers.Dinov2Model`): The network, with or without registers; see
            [`DINOv2Extractor.from_pretrained`].
        name (`str`): Its name, for protocols.
    """

    resize = f"bicubic, antialiased, to {DINOV2_SIZE}, rounded to 8 bits"

    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        self.model, self.name = model.requires_grad_(False).eval(), name
        self.digest = weights_digest(model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike) -> "DINOv2Extractor":
        """
        A published model, such as `facebook/dinov2-large`, which FD-DINOv2 is defined with.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub repository.

        Returns:
            [`DINOv2Extractor`]: On the CPU, in float32.

        Raises:
            ImportError: If transformers is not installed.
            OSError: If the model cannot be found or read; says what to put where.
            ValueError: If it is of another kind or lacks weights.
        """
        with needing("transformers"):
            from transformers import AutoConfig, AutoModel

        name = os.fspath(pretrained_model_name_or_path)
        try:
            config = AutoConfig.from_pretrained(name)
            if config.model_type not in ("dinov2", "dinov2_with_registers"):
                raise ValueError(
                    f"`pretrained_model_name_or_path` {name!r} is a model of type {config.model_type!r}, not a DINOv2."
                )
            model, info = AutoModel.from_pretrained(
                name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
        except OSError as error:
            raise OSError(
                f"{name!r} could not be loaded ({error}). Without a network, run `hf download {name}` elsewhere and "
                "name the folder with its `config.json` and `model.safetensors`."
            ) from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:3])
            raise ValueError(f"{name!r} lacks weights of its model ({missing}, ...): download it again.")
        return cls(model, name)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`torch.ByteTensor` of shape `(n, 3, height, width)`): On any device.

        Returns:
            `dict[str, torch.Tensor]`: `"pool"` in float32, on the network's device.

        Raises:
            ValueError: If the images are not 8-bit colour images.
        """
        values = _on_device(images, self).float()
        with full_float32(values.device):
            size = (DINOV2_SIZE, DINOV2_SIZE)
            values = F.interpolate(values, size, mode="bicubic", antialias=True).clamp(0, 255).round() / 255
            mean, std = (values.new_tensor(numbers)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
            return {"pool": self.model(pixel_values=(values - mean) / std).pooler_output}


def load_extractor(name: str, weights: str | None = None) -> FeatureExtractor:
    """
    A network that gives features.

    Args:
        name (`str`): `"inception"`, `"dinov2"`, or `"module:function"`, which returns one.
        weights (`str`, *optional*): File of Inception's weights, or folder or Hub repository of a DINOv2.

    Returns:
        [`FeatureExtractor`]: On the CPU, or where the function made it.

    Raises:
        OSError: If weights are missing; says which file to put where.
        ValueError: If there is no such module or function.
    """
    if name == "inception":
        return InceptionExtractor.from_file(weights)
    if name == "dinov2":
        return DINOv2Extractor.from_pretrained(weights or DEFAULT_DINOV2)
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (AttributeError, ImportError) as error:
        raise ValueError(
            f"`extractor` {name!r} cannot be imported ({error}): put the folder of the module on PYTHONPATH."
        ) from error
    return make()


def extractor_identity(extractor: FeatureExtractor) -> dict[str, str]:
    """
    What features depend on besides the images, to be compared when they are read.

    Args:
        extractor ([`FeatureExtractor`]): What gives them.

    Returns:
        `dict[str, str]`: Plain values.
    """
    return {"extractor": extractor.name, "extractor_digest": extractor.digest, "resize": extractor.resize}


def load_statistics(path: str | Path, extractor: FeatureExtractor) -> dict[str, Moments]:
    """
    Read the statistics of features that an extractor gave.

    Args:
        path (`str` or `Path`): A file of [`save_moments`], or a reference file of ADM's suite.
        extractor ([`FeatureExtractor`]): The features must be its own; those of a file that does not say so, as ADM's
            does not, are taken for Inception's.

    Returns:
        `dict[str, Moments]`: By layer.

    Raises:
        ValueError: If the file holds no statistics, or those of another network.
    """
    known, protocol = load_moments(path, extractor_identity(extractor))
    if protocol is None and not isinstance(extractor, InceptionExtractor):
        raise ValueError(
            f"{os.fspath(path)} does not say of which network its statistics are: they are taken for Inception's, and "
            f"the extractor is {extractor.name!r}. Give images, or statistics that an evaluation has written."
        )
    return known


def weights_digest(module: nn.Module) -> str:
    """
    A text that changes with any weight or buffer.

    Args:
        module (`torch.nn.Module`): The network.

    Returns:
        `str`: SHA-256 of names, types, shapes and values, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """
    No autocast and no TF32, by which GPUs round float32 to 10 bits of mantissa: a metric shall not depend on them.

    Args:
        device (`torch.device`): Where the computation runs.
    """
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    flags = {"enabled": cudnn.enabled, "benchmark": cudnn.benchmark, "deterministic": cudnn.deterministic}
    try:
        with torch.autocast(device.type, enabled=False), cudnn.flags(**flags, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _on_device(images: torch.Tensor, module: nn.Module) -> torch.Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"`images` must be uint8 of shape (n, 3, height, width), got {images.dtype} of {tuple(images.shape)}."
        )
    return images.to(next(module.parameters()).device)
