"""How a class-conditional velocity is guided: by a null class, by a weaker model, or by the model's own training.

Every method has one scale s, where 1 is no guidance, and applies inside an interval of times only ([arXiv
2404.07724](https://huggingface.co/papers/2404.07724)):

| method | velocity inside the interval | passes inside, outside |
| --- | --- | --- |
| `"cfg"` | `null + s * (conditional - null)` | 2, 1 |
| `"autoguidance"` | `weak + s * (strong - weak)` | 2, 1 |
| `"gft"` | the model's own, at temperature `1 / s` | 1, 1 |

These are classifier-free guidance, autoguidance with a second network ([arXiv
2406.02507](https://huggingface.co/papers/2406.02507)) and guidance-free training ([arXiv
2501.15420](https://huggingface.co/papers/2501.15420)), whose optimum at temperature `1 / s` is the velocity of
classifier-free guidance at scale s. Outside the interval the velocity is the conditional one of the `transformer`, at
temperature 1 if it knows temperatures.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import ModelMixin


GUIDANCE_METHODS = ("cfg", "autoguidance", "gft")
# published for SiT-XL at 256 pixels with classifier-free guidance, which guidance-free training equals at its optimum
DEFAULT_GUIDANCE_SCALE = 1.9
# times are float32 in some schedulers: the interval's ends still count as inside
_INTERVAL_TOLERANCE = 1e-6


class Guidance(NamedTuple):
    """A method among `GUIDANCE_METHODS` and its scale."""

    method: str
    scale: float


def has_temperature(transformer: ModelMixin) -> bool:
    """
    Whether a transformer was built for guidance-free training.

    Args:
        transformer ([`ModelMixin`]): Velocity model.

    Returns:
        `bool`: The `temperature_embedding` of its config.
    """
    return transformer.config.temperature_embedding


def is_inside(time: float, interval: tuple[float, float]) -> bool:
    """
    Whether guidance applies at a time.

    Args:
        time (`float`): Time in [0, 1].
        interval (`tuple[float, float]`): Lowest and highest time, both inclusive.

    Returns:
        `bool`: Whether it lies in the interval, up to the rounding of a float32.
    """
    return interval[0] - _INTERVAL_TOLERANCE <= time <= interval[1] + _INTERVAL_TOLERANCE


def combine_velocities(base: torch.Tensor, velocity: torch.Tensor, scale: float) -> torch.Tensor:
    """
    Extrapolate from a worse velocity through a better one.

    Args:
        base (`torch.Tensor`): Velocity to move away from: that of the null class, or of a weak model.
        velocity (`torch.Tensor` of the shape of `base`): Velocity to move towards.
        scale (`float`): 0 gives `base`, 1 gives `velocity`.

    Returns:
        `torch.Tensor` of the shape of `base`: `base + scale * (velocity - base)`.
    """
    return base + scale * (velocity - base)


def check_guidance_scale(scale: Any, name: str = "guidance_scale") -> None:
    """
    Args:
        scale (`float`): Scale of guidance.
        name (`str`, *optional*, defaults to `"guidance_scale"`): What it is called, for the message.

    Raises:
        ValueError: If it is not a finite number of at least 0.
    """
    if not _is_number(scale) or not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"`{name}` must be a finite number of at least 0 (1 is no guidance), got {scale!r}.")


def check_guidance_interval(interval: Any, name: str = "guidance_interval") -> None:
    """
    Args:
        interval (`tuple[float, float]`): Lowest and highest time of guidance.
        name (`str`, *optional*, defaults to `"guidance_interval"`): What it is called, for the message.

    Raises:
        ValueError: If it is not a pair of ordered times in [0, 1].
    """
    is_pair = isinstance(interval, (list, tuple)) and len(interval) == 2
    if not is_pair or not all(map(_is_number, interval)) or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(
            f"`{name}` must be (low, high), times in [0, 1] with low <= high and noise at 1, got {interval!r}."
        )


def resolve_guidance(
    method: str | None,
    scale: float | None,
    temperature: float | None,
    transformer: ModelMixin,
    guidance_transformer: ModelMixin | None,
    default_scale: float = DEFAULT_GUIDANCE_SCALE,
) -> Guidance:
    """
    The guidance that the arguments of a call ask for, with the components that are there.

    Without a `method` it is `"gft"` if a `temperature` is given or the transformer knows temperatures, else
    `"autoguidance"` if there is a guidance transformer, else `"cfg"`.

    Args:
        method (`str`, *optional*): One of `GUIDANCE_METHODS`.
        scale (`float`, *optional*): Scale s; `default_scale` if neither it nor `temperature` is given.
        temperature (`float`, *optional*): `1 / s` in (0, 1], for `"gft"` only.
        transformer ([`ModelMixin`]): Velocity model to be guided.
        guidance_transformer ([`ModelMixin`], *optional*): Weak model of autoguidance.
        default_scale (`float`, *optional*, defaults to 1.9): Scale where none is given.

    Returns:
        [`Guidance`]: Method and scale.

    Raises:
        ValueError: If an argument is out of range, two of them contradict each other, or a component is missing.
    """
    if method is not None and method not in GUIDANCE_METHODS:
        raise ValueError(f"`guidance_method` must be one of {GUIDANCE_METHODS} or None, got {method!r}.")
    if method is None:
        if temperature is not None or has_temperature(transformer):
            method = "gft"
        else:
            method = "cfg" if guidance_transformer is None else "autoguidance"
    if temperature is not None:
        scale = _scale_of_temperature(temperature, method, scale)
    elif scale is None:
        scale = default_scale

    if method == "autoguidance" and guidance_transformer is None:
        raise ValueError(
            "`guidance_method='autoguidance'` needs the component `guidance_transformer`, a weaker model such as an "
            "earlier checkpoint, which this pipeline does not have: set `pipe.guidance_transformer`."
        )
    if method == "gft" and not has_temperature(transformer):
        asked = "guidance_method='gft'" if temperature is None else f"guidance_temperature={temperature}"
        raise ValueError(
            f"`{asked}` needs a `transformer` trained for it, with `temperature_embedding=True` in its config, which "
            "this pipeline does not have: pass `guidance_scale` instead, for classifier-free guidance."
        )
    check_guidance_scale(scale)
    if method == "cfg" and scale != 1 and transformer.config.class_dropout_prob == 0:
        raise ValueError(
            f"`guidance_scale` = {scale} is classifier-free guidance, but the `transformer` was trained without "
            "dropping classes (`class_dropout_prob` is 0 in its config), so its null class means nothing: pass "
            "`guidance_scale=1`, or set `pipe.guidance_transformer`."
        )
    if method == "gft" and scale < 1:
        raise ValueError(
            f"`guidance_scale` must be at least 1 for a transformer trained without guidance, whose temperature is "
            f"1 / `guidance_scale`, got {scale!r}."
        )
    return Guidance(method, scale)


def _scale_of_temperature(temperature: Any, method: str, scale: float | None) -> float:
    if scale is not None:
        raise ValueError(
            f"pass either `guidance_scale` or `guidance_temperature`, its inverse, not both, got {scale!r} and "
            f"{temperature!r}."
        )
    if method != "gft":
        raise ValueError(f"`guidance_temperature` belongs to `guidance_method='gft'`, got {method!r}.")
    if not _is_number(temperature) or not 0 < temperature <= 1:
        raise ValueError(f"`guidance_temperature` must lie in (0, 1] (1 is no guidance), got {temperature!r}.")
    return 1 / temperature


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
