"""The authors' checkpoints, in a folder or on the Hub, to models of this library."""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models.autoencoder_mae import AutoencoderMAE
from ..models.transformer_sit import SiTTransformer1DModel
from . import state_dict as tables


CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_PT_SUFFIXES = (".pt", ".pth")
# where the authors' training code keeps weights inside a .pt checkpoint, best first
_PT_ENTRIES = ("ema", "model")
# wrappers of a training run: DistributedDataParallel and torch.compile
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def _resolve(path_or_repo_id: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path:
    folder = Path(path_or_repo_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise OSError(f"the folder {folder} has no {name}; a checkpoint in the authors' format has one.")
        return folder / name
    if folder.exists() or folder.is_absolute() or str(path_or_repo_id).startswith((".", "~")):
        raise OSError(f"{path_or_repo_id} is neither a folder nor a Hub repo id.")
    try:
        return Path(hf_hub_download(str(path_or_repo_id), name, revision=revision, token=token))
    except LocalEntryNotFoundError:
        raise  # the Hub could not be reached, which its own message explains
    except EntryNotFoundError as error:
        raise OSError(f"the Hub repo {path_or_repo_id} has no {name}; it is not in the authors' format.") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object.")
    return config


def _strip_wrappers(key: str) -> str:
    while key.startswith(_WRAPPER_PREFIXES):
        key = key.partition(".")[2]
    return key


def _read_pt(path: Path) -> dict[str, torch.Tensor]:
    """A training checkpoint: the EMA weights if there are any, else the model's."""
    try:
        # the authors' code stores its parsed flags beside the weights: plain attributes, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle stream can raise anything
        raise ValueError(
            f"{path} is corrupt or holds more than weights, and nothing in it was run ({error}). If you trust it, "
            "save its weights alone with `safetensors.torch.save_file`."
        ) from error
    if isinstance(checkpoint, Mapping):
        for entry in _PT_ENTRIES:
            if isinstance(checkpoint.get(entry), Mapping):
                checkpoint = checkpoint[entry]
                break
    if not isinstance(checkpoint, Mapping) or not all(isinstance(v, torch.Tensor) for v in checkpoint.values()):
        raise ValueError(
            f"{path} holds no state dict, neither by itself nor under {' or '.join(map(repr, _PT_ENTRIES))}."
        )
    state_dict = {_strip_wrappers(key): value for key, value in checkpoint.items()}
    if len(state_dict) != len(checkpoint):
        raise ValueError(f"{path} holds keys that differ only by a prefix of {_WRAPPER_PREFIXES}: which one is meant?")
    return state_dict


def _load(
    path_or_repo_id: str | Path, config: Mapping[str, Any] | None, revision: str | None, token: str | bool | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = Path(path_or_repo_id)
    if path.is_dir() and not (path / WEIGHTS_NAME).is_file():
        training = sorted(file for file in path.iterdir() if file.suffix in _PT_SUFFIXES)
        if len(training) > 1:
            raise ValueError(
                f"{path} has no {WEIGHTS_NAME} but several training checkpoints, "
                f"{', '.join(file.name for file in training)}: pass the path of one of them."
            )
        path = training[0] if training else path
    if path.suffix in _PT_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise OSError(f"there is no file {path}.")
        if config is None:
            if not (path.parent / CONFIG_NAME).is_file():
                raise ValueError(
                    f"a .pt checkpoint needs the model's config: pass `config` or put {CONFIG_NAME} beside {path}."
                )
            config = _read_config(path.parent / CONFIG_NAME)
        return dict(config), _read_pt(path)

    config = _read_config(_resolve(path_or_repo_id, CONFIG_NAME, revision, token)) if config is None else dict(config)
    weights = _resolve(path_or_repo_id, WEIGHTS_NAME, revision, token)
    try:
        return config, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a readable safetensors file ({error}): download it again.") from error


def _build(model_class: type[ModelMixin], config: dict[str, Any], state_dict: dict[str, torch.Tensor]) -> ModelMixin:
    with torch.device("meta"):
        model = model_class(**config)
    expected = model.state_dict()
    wrong = [
        f"{key}: {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state_dict.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if wrong:
        raise ValueError(f"tensors of the checkpoint do not fit the sizes that its config gives: {'; '.join(wrong)}.")
    not_floating = [f"{key}: {value.dtype}" for key, value in state_dict.items() if not value.is_floating_point()]
    if not_floating:
        raise ValueError(f"tensors of the checkpoint are not floating-point numbers: {'; '.join(not_floating)}.")
    # the authors store some checkpoints in half precision; copies, so that no tensor shares memory with another
    state_dict = {key: value.to(torch.float32, copy=True).contiguous() for key, value in state_dict.items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _convert(
    model_class: type[ModelMixin],
    map_config: Callable,
    map_state_dict: Callable,
    path_or_repo_id: str | Path,
    config: Mapping[str, Any] | None,
    revision: str | None,
    token: str | bool | None,
) -> ModelMixin:
    authors_config, authors_state_dict = _load(path_or_repo_id, config, revision, token)
    model_config = map_config(authors_config, authors_state_dict)
    return _build(model_class, model_config, map_state_dict(authors_state_dict, model_config))


def convert_autoencoder(
    path_or_repo_id: str | Path,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> AutoencoderMAE:
    """
    Load an authors' tokenizer checkpoint.

    Args:
        path_or_repo_id (`str` or `Path`):
            A folder or Hub repo with `config.json` and `model.safetensors`, or a `.pt` file of the authors' training
            code or a folder with one (read with `weights_only=True`; its EMA weights are preferred).
        config (`Mapping`, *optional*): The authors' config, instead of the `config.json` beside the weights.
        revision (`str`, *optional*): Revision of the Hub repo.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        [`AutoencoderMAE`]: In float32 and evaluation mode, with `latents_mean` and `latents_std` set.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If a key is missing or unknown (the message lists them), a shape or a config entry does not fit, or
            a file is corrupt.
    """
    maps = tables.autoencoder_config, tables.convert_autoencoder_state_dict
    return _convert(AutoencoderMAE, *maps, path_or_repo_id, config, revision, token)


def convert_transformer(
    path_or_repo_id: str | Path,
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> SiTTransformer1DModel:
    """
    Load an authors' SiT checkpoint.

    Args:
        path_or_repo_id (`str` or `Path`):
            A folder or Hub repo with `config.json` and `model.safetensors`, or a `.pt` file of the authors' training
            code or a folder with one (read with `weights_only=True`; its EMA weights are preferred).
        config (`Mapping`, *optional*): The authors' config, instead of the `config.json` beside the weights.
        revision (`str`, *optional*): Revision of the Hub repo.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        [`SiTTransformer1DModel`]: In float32 and evaluation mode.

    Raises:
        OSError: If the checkpoint cannot be found.
        ValueError: If a key is missing or unknown (the message lists them), a shape or a config entry does not fit, or
            a file is corrupt.
    """
    maps = tables.transformer_config, tables.convert_transformer_state_dict
    return _convert(SiTTransformer1DModel, *maps, path_or_repo_id, config, revision, token)
