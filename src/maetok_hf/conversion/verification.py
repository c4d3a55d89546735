"""Whether a converted model is what it was converted from: the way back is the identity, and its outputs are right.

The outputs are compared with those of [`~conversion.reference`], which knows nothing of our models.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..models.autoencoder_mae import AutoencoderMAE
from ..models.transformer_sit import SiTTransformer1DModel
from . import state_dict as tables
from .configs import (
    autoencoder_config,
    revert_autoencoder_config,
    revert_transformer_config,
    transformer_config,
)
from .reference import reference_decode, reference_encode, reference_velocity


# Root mean square of the difference over that of the reference. Random weights of the published sizes give 7e-7 in
# float32, and the large activations of trained ones may give more; a tensor in the wrong place gives about 1. Whether
# our layers are the authors' is not asked here: tests compare them with outputs of the authors' code.
TOLERANCE = 1e-4
SEED = 0


class ConversionError(ValueError):
    """A converted model does not compute what the authors' weights compute."""


@dataclass(frozen=True)
class Verification:
    """
    What was compared, and found equal.

    Args:
        num_tensors (`int`): Tensors of the authors' format that came back bit for bit.
        left_out (`list[str]`): Tensors of the checkpoint that inference does not need.
        differences (`dict[str, float]`): Relative difference from the reference by name of the output.
    """

    num_tensors: int
    left_out: list[str]
    differences: dict[str, float]


def _rounded(state_dict: Mapping[str, torch.Tensor], dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.Tensor]:
    """The authors' weights as they are after a conversion to other dtypes, in float32."""
    return {key: value.float().to(dtypes.get(key, torch.float32)).float() for key, value in state_dict.items()}


def _check_round_trip(expected: Mapping[str, torch.Tensor], reverted: Mapping[str, torch.Tensor]) -> None:
    wrong = []
    for key, value in reverted.items():
        original = expected.get(key)
        if key == "decoder.model.pos_embed" and original is not None and original.ndim == value.ndim == 3:
            original = original[:, original.shape[1] - value.shape[1] :]  # less the entry of an absent class token
        if original is None or not torch.equal(value.detach().cpu().float(), original):
            wrong.append(key)
    if wrong:
        raise ConversionError(f"the way back to the authors' format changes {len(wrong)} tensors: {', '.join(wrong)}.")


def _check_config(expected: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    wrong = [
        f"`{name}` is {config.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if config.get(name) != value
    ]
    if wrong:
        raise ConversionError(f"the config is not that of the authors' checkpoint: {'; '.join(wrong)}.")


def _difference(name: str, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative difference of an output from the reference; of zeros, the absolute one."""
    error = (actual.detach().cpu().double() - expected).square().mean().sqrt().item()
    size = expected.square().mean().sqrt().item()
    relative = error / size if size > 0 else error
    if not relative <= TOLERANCE:
        raise ConversionError(
            f"the {name} of a fixed input differ from what the authors' weights give by {relative:.2g} of their size, "
            f"and only {TOLERANCE:g} can be rounding."
        )
    return relative


def _verify(
    model: torch.nn.Module,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None,
    map_config: Callable,
    revert_config: Callable,
    revert_state_dict: Callable,
    outputs: Callable[[dict[str, torch.Tensor]], dict[str, tuple[torch.Tensor, torch.Tensor]]],
) -> Verification:
    stored = {} if dtypes is None else {key: dtypes[name] for key, name in _origins(model, revert_state_dict).items()}
    expected = _rounded(state_dict, stored)
    reverted = revert_state_dict(model.state_dict())
    _check_round_trip(expected, reverted)
    converted = map_config(config, state_dict)
    _check_config(converted, model.config)
    _check_config(converted, map_config(revert_config(model.config), reverted))
    differences = {name: _difference(name, *pair) for name, pair in outputs(expected).items()}
    return Verification(len(reverted), sorted(state_dict.keys() - reverted.keys()), differences)


def _origins(model: torch.nn.Module, revert_state_dict: Callable) -> dict[str, str]:
    """For every key of the authors' format, the name of (one of) our tensors that it holds."""
    names = list(model.state_dict())
    # tensors of one number, their index, travel the same way
    indices = {name: torch.full((1,), float(index)) for index, name in enumerate(names)}
    return {key: names[int(value[0])] for key, value in revert_state_dict(indices).items()}


@torch.no_grad()
def verify_autoencoder(
    model: AutoencoderMAE,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Verification:
    """
    Compare a converted tokenizer with the authors' checkpoint.

    Args:
        model ([`AutoencoderMAE`]): The converted model, in float32 and evaluation mode.
        config (`Mapping`): The authors' config.
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the authors' names.
        dtypes (`Mapping[str, torch.dtype]`, *optional*): Dtypes that the model's tensors were stored in, by their name
            in the model, if they were rounded: the authors' weights are then rounded in the same way.

    Returns:
        [`Verification`]: What was compared.

    Raises:
        ConversionError: If a tensor or an entry of the config does not come back, or an output differs.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = model.config.sample_size
    image = torch.rand(1, model.config.in_channels, size, size, generator=generator) * 2 - 1

    def outputs(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        latent = reference_encode(weights, config, image)
        decoded = model.decode(latent.float()).sample
        return {
            "latents": (model.encode(image).latent, latent),
            "images": (decoded, reference_decode(weights, config, latent.float())),
        }

    maps = autoencoder_config, revert_autoencoder_config, tables.revert_autoencoder_state_dict
    return _verify(model, config, state_dict, dtypes, *maps, outputs)


@torch.no_grad()
def verify_transformer(
    model: SiTTransformer1DModel,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Verification:
    """
    Compare a converted SiT with the authors' checkpoint.

    Args:
        model ([`SiTTransformer1DModel`]): The converted model, in float32 and evaluation mode.
        config (`Mapping`): The authors' config.
        state_dict (`Mapping[str, torch.Tensor]`): Weights under the authors' names.
        dtypes (`Mapping[str, torch.dtype]`, *optional*): As for [`verify_autoencoder`].

    Returns:
        [`Verification`]: What was compared.

    Raises:
        ConversionError: If a tensor or an entry of the config does not come back, or an output differs.
    """
    generator = torch.Generator().manual_seed(SEED)
    num_classes = model.config.num_classes
    sample = torch.randn(2, model.config.sample_size, model.config.in_channels, generator=generator)
    inputs = (
        sample,
        torch.tensor([0.3, 0.9]),
        torch.tensor([num_classes // 2, num_classes]),
    )  # a class and the null one

    def outputs(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {"velocities": (model(*inputs).sample, reference_velocity(weights, config, *inputs))}

    maps = transformer_config, revert_transformer_config, tables.revert_transformer_state_dict
    return _verify(model, config, state_dict, dtypes, *maps, outputs)
