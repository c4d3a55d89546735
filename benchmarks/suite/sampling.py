"""Whole sampling runs by the pipeline, from noise to pixels."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from .cases import DTYPES, USUAL_MODES, Case, Settings, Work, count_flops
from .models import pipeline


INTERVAL = (0.0, 0.75)
SCHEMES: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "CFG": {"guidance_scale": 1.9, "guidance_interval": (0.0, 1.0)},
    "CFG with interval": {"guidance_scale": 1.9, "guidance_interval": INTERVAL},
    "autoguidance": {"guidance_scale": 1.9, "guidance_interval": INTERVAL},
    "GFT": {"guidance_scale": 1.9, "guidance_interval": INTERVAL},
}


def flops_of_passes(models: Sequence[nn.Module], run: Callable[[], Any]) -> int:
    """
    Operations of a run whose passes are of one size for each model: a pass of each is counted, the others are
    skipped, with its result in the place of theirs.
    """
    total = 0

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        found: list[Any] = []

        def passing(*arguments: Any, **named: Any) -> Any:
            nonlocal total
            if not found:
                flops = count_flops(lambda: found.append(forward(*arguments, **named)))
                found.append(flops)
            total += found[1]
            return copy.deepcopy(found[0])  # as the run may write into it

        return passing

    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(patch.object(model, "forward", counting(model.forward)))
        run()
    return total


def sample(settings: Settings, size: str, weak: str, scheme: str, solver: str, steps: int, batch_size: int) -> Work:
    pipe = pipeline(size, solver, weak if scheme == "autoguidance" else None, guidance_free=scheme == "GFT")
    models = [model for model in (pipe.transformer, pipe.guidance_transformer, pipe.vae) if model is not None]
    for model in models:
        settings.prepare(model)
    labels = [7 * number for number in range(batch_size)]

    def run(steps: int) -> None:
        generator = torch.Generator(settings.torch_device).manual_seed(0)
        pipe(labels, num_inference_steps=steps, generator=generator, output_type="pt", **SCHEMES[scheme])

    return Work(
        partial(run, steps),
        batch_size,
        lambda: settings.compile(*models[:-1], pipe.vae.decoder),
        count=lambda: flops_of_passes([*models[:-1], pipe.vae.decoder], partial(run, steps)),
        warm=partial(run, 4),  # both phases of guidance
    )


CASES = [
    Case(
        "sampling",
        f"{size}, {scheme}, {solver}, {steps} steps, batch {batch}",
        partial(sample, size=size, weak=weak, scheme=scheme, solver=solver, steps=steps, batch_size=batch),
        dtypes=dtypes,
        modes=modes,
        devices=(device,),
    )
    for device, size, weak, batches, dtypes, modes in (
        ("cpu", "SiT-B", "SiT-S", (1,), ("bfloat16",), ("eager",)),
        ("cuda", "SiT-XL", "SiT-B", (1, 8, 64, 256), DTYPES, USUAL_MODES),
    )
    for batch in batches
    for scheme in SCHEMES
    for solver in ("SDE", "ODE")
    for steps in (250, 50)
]
