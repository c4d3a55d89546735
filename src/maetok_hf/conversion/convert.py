"""The authors' checkpoints, in a folder or on the Hub, to models of this library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..models.autoencoder_mae import AutoencoderMAE
from ..models.transformer_sit import SiTTransformer1DModel
from . import configs
from . import state_dict as tables
from .weight_files import find_state_dict, read_pt, read_safetensors


CONFIG_NAME = "config.json"
_CONFIG_BYTES = 2**20  # the authors' configs take less than two thousand
WEIGHTS_NAME = "model.safetensors"
_PT_SUFFIXES = (".pt", ".pth")
# where the authors' training code keeps weights inside a .pt checkpoint, best first
_PT_ENTRIES = ("ema", "model")
# two numbers in one, which no operation converts; unknown to older versions of torch
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)
# wrappers of a training run: DistributedDataParallel and torch.compile
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def _check_link(folder: Path, file: Path) -> None:
    """
    Refuse a link that leads out of a folder: a snapshot of unknown origin could have any file of this machine read,
    and uploaded. The Hub's cache links from its snapshots to its own blobs.
    """
    target, folder = file.resolve(), folder.resolve()
    in_cache = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    if file.is_symlink() and not (in_cache or target.is_relative_to(folder)):
        raise OSError(
            f"{file} is a link to {target}, out of its folder: put a copy in its place, or give the folder of the "
            "file itself."
        )


def _resolve(path_or_repo_id: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path:
    folder = Path(path_or_repo_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise OSError(f"the folder {folder} has no {name}; a checkpoint in the authors' format has one.")
        _check_link(folder, folder / name)
        return folder / name
    if folder.exists() or folder.is_absolute() or str(path_or_repo_id).startswith((".", "~")):
        raise OSError(f"{path_or_repo_id} is neither a folder nor a Hub repo id.")
    try:
        return Path(hf_hub_download(str(path_or_repo_id), name, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"there is no folder {folder}, and {name} of a Hub repo of this name is not in the cache and could not be "
            f"downloaded ({error})."
        ) from error
    except EntryNotFoundError as error:
        raise OSError(f"the Hub repo {path_or_repo_id} has no {name}; it is not in the authors' format.") from error
    except (OSError, ValueError):
        raise
    except Exception as error:  # a connection that broke, of which each HTTP library has its own errors
        raise OSError(
            f"{name} of the Hub repo {path_or_repo_id} could not be downloaded ({error}): try again, which continues "
            "where it broke off."
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes: a config has less than {_CONFIG_BYTES}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON for a config: it is nested too deeply.") from error
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
    found = find_state_dict(path, read_pt(path), _PT_ENTRIES)
    state_dict = {_strip_wrappers(key): value for key, value in found.items()}
    if len(state_dict) != len(found):
        raise ValueError(f"{path} holds keys that differ only by a prefix of {_WRAPPER_PREFIXES}: which one is meant?")
    return state_dict


class _Files(NamedTuple):
    """Where a checkpoint's config and weights are: the weights of a repository only after `weights()`."""

    config: dict[str, Any]
    weights: Callable[[], Path]


def _find_weights_in(folder: Path) -> Path | None:
    """The training checkpoint of a folder that has one instead of the Hub's format."""
    if (folder / WEIGHTS_NAME).is_file():
        return None
    training = sorted(file for file in folder.iterdir() if file.suffix in _PT_SUFFIXES)
    if len(training) > 1:
        raise ValueError(
            f"{folder} has no {WEIGHTS_NAME} but several training checkpoints, "
            f"{', '.join(file.name for file in training)}: pass the path of one of them."
        )
    if training:
        _check_link(folder, training[0])
    return training[0] if training else None


def _find(
    path_or_repo_id: str | Path, config: Mapping[str, Any] | None, revision: str | None, token: str | bool | None
) -> _Files:
    path = Path(path_or_repo_id)
    if path.is_dir():
        path = _find_weights_in(path) or path
    if path.suffix in _PT_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise OSError(f"there is no file {path}.")
        if config is None:
            if not (path.parent / CONFIG_NAME).is_file():
                raise ValueError(
                    f"a .pt checkpoint needs the model's config: pass `config` or put {CONFIG_NAME} beside {path}."
                )
            config = _read_config(path.parent / CONFIG_NAME)
        return _Files(dict(config), lambda: path)

    config = _read_config(_resolve(path_or_repo_id, CONFIG_NAME, revision, token)) if config is None else dict(config)
    return _Files(config, lambda: _resolve(path_or_repo_id, WEIGHTS_NAME, revision, token))


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    return _read_pt(path) if path.suffix in _PT_SUFFIXES else read_safetensors(path)


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
    not_floating = [
        f"{key}: {value.dtype}"
        for key, value in state_dict.items()
        if not value.is_floating_point() or value.dtype == _PACKED
    ]
    if not_floating:
        raise ValueError(f"tensors of the checkpoint are not floating-point numbers: {'; '.join(not_floating)}.")
    not_finite = [key for key, value in state_dict.items() if not value.float().isfinite().all()]
    if not_finite:
        raise ValueError(f"tensors of the checkpoint hold NaN or infinity: {'; '.join(not_finite)}.")
    # the authors store some checkpoints in half precision; copies, so that no tensor shares memory with another
    state_dict = {key: value.to(torch.float32, copy=True).contiguous() for key, value in state_dict.items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


class AuthorsCheckpoint:
    """
    A checkpoint in the authors' format, of which nothing but the config is read before `convert`.

    Args:
        kind (`str`): `"tokenizer"` or `"transformer"`.
        path_or_repo_id (`str` or `Path`): As for [`convert_autoencoder`].
        config (`Mapping`, *optional*): The authors' config, instead of the `config.json` beside the weights.
        revision (`str`, *optional*): Revision of the Hub repo.
        token (`str` or `bool`, *optional*): Hub token.

    Attributes:
        config (`dict[str, Any]`): The authors' config.
        state_dict (`dict[str, torch.Tensor]`): Weights under the authors' names, once they are read.

    Raises:
        OSError: If the config cannot be found.
        ValueError: If it is corrupt, or an entry has an unexpected type or value.
    """

    def __init__(
        self,
        kind: str,
        path_or_repo_id: str | Path,
        config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ):
        self.kind = kind
        self.config, self._find_weights = _find(path_or_repo_id, config, revision, token)
        self.state_dict: dict[str, torch.Tensor] = {}
        read = configs.read_autoencoder_entries if kind == "tokenizer" else configs.read_transformer_entries
        read(self.config)

    def read(self) -> None:
        """
        Find the weights, which the Hub may have to send, and read them; `convert` does this if it was not done.

        Raises:
            OSError: If the weights cannot be found.
            ValueError: If they are corrupt.
        """
        self.state_dict = _read_weights(self._find_weights())

    def convert(self) -> AutoencoderMAE | SiTTransformer1DModel:
        """
        Build the model.

        Returns:
            [`AutoencoderMAE`] or [`SiTTransformer1DModel`]: In float32 and evaluation mode; it shares no memory with
            the weights that were read.

        Raises:
            OSError: If the weights cannot be found.
            ValueError: If they are corrupt, or do not fit the config or the tables.
        """
        if not self.state_dict:
            self.read()
        if self.kind == "tokenizer":
            config = configs.autoencoder_config(self.config, self.state_dict)
            return _build(AutoencoderMAE, config, tables.convert_autoencoder_state_dict(self.state_dict, config))
        config = configs.transformer_config(self.config, self.state_dict)
        return _build(SiTTransformer1DModel, config, tables.convert_transformer_state_dict(self.state_dict, config))


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
    return AuthorsCheckpoint("tokenizer", path_or_repo_id, config, revision, token).convert()


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
    return AuthorsCheckpoint("transformer", path_or_repo_id, config, revision, token).convert()
