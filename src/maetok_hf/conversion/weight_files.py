"""Files with weights from strangers: nothing in them is run, and what is no plain tensor is refused."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def _reason(error: Exception) -> str:
    """What torch says of a file without its advice, which is to read it with `weights_only=False`."""
    lines = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    found = [line.strip() for line in lines.splitlines() if line.strip()]
    found = [line for line in found if not line.startswith(("Weights only load failed", "Check the documentation"))]
    return found[0] if found else type(error).__name__


def read_pt(path: Path) -> Any:
    """
    What a `.pt` file holds.

    Args:
        path (`Path`): The file.

    Returns:
        `Any`: Tensors, and plain values around them.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is corrupt, or holds anything that is no plain value.
    """
    try:
        # the authors' code stores its parsed flags beside the weights: plain attributes, no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle stream can raise anything
        raise ValueError(
            f"{path} is corrupt or holds more than weights, and nothing in it was run ({_reason(error)}). Download it "
            "again or, if you trust it, save its weights alone with `safetensors.torch.save_file`."
        ) from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file.

    Args:
        path (`Path`): The file.

    Returns:
        `dict[str, torch.Tensor]`: Tensors by name.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is corrupt.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): download it again.") from error


def find_state_dict(path: Path, content: Any, entries: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """
    The weights in what a `.pt` file holds.

    Args:
        path (`Path`): The file, for messages.
        content (`Any`): Of [`read_pt`].
        entries (`tuple[str, ...]`): Keys under which there may be a state dict, best first; else it is one itself.

    Returns:
        `dict[str, torch.Tensor]`: Tensors by name.

    Raises:
        ValueError: If there is none, or one of its tensors is sparse, quantised or without data.
    """
    if isinstance(content, Mapping):
        content = next((content[name] for name in entries if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    ):
        places = " or ".join(map(repr, entries))
        raise ValueError(f"{path} holds no state dict, neither by itself nor under {places}: is it the right file?")
    odd = [
        key
        for key, value in content.items()
        if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested
    ]
    if odd:
        raise ValueError(f"{path} holds tensors that are sparse, nested, quantised or without data: {', '.join(odd)}.")
    return dict(content)
