"""Laws that hold for every scheduler that the pipeline samples with: diffusers' own and this library's."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file

from maetok_hf import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler, convert_transformer
from tests.schedulers.fields import MEAN, STD, gaussian_velocity, integrate
from tests.testing_utils import GOLDEN, seeded_normal


FLOW_MODE = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ODE_SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
    "heun": lambda: FlowMatchHeunScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW_MODE),
    "dpm": lambda: DPMSolverMultistepScheduler(**FLOW_MODE),
}


def set_uniform_grid(scheduler, steps):
    """What the pipeline does: the uniform grid, wherever a scheduler takes one."""
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())


@pytest.mark.parametrize("name", ODE_SCHEDULERS)
def test_a_constant_field_is_integrated_exactly(name):
    scheduler = ODE_SCHEDULERS[name]()
    set_uniform_grid(scheduler, 7)
    sample, velocity = seeded_normal(2, 6, 4), seeded_normal(2, 6, 4, seed=1)
    end = integrate(scheduler, lambda x, t: velocity, sample)
    # UniPC and DPM-Solver++ start a little below t = 1, at sigmas[0]
    torch.testing.assert_close(end, sample - scheduler.sigmas[0].item() * velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "bound"), [("euler", 0.15), ("heun", 2e-2), ("unipc", 1e-2), ("dpm", 2e-2)])
def test_the_ode_carries_noise_to_the_data(name, bound):
    scheduler = ODE_SCHEDULERS[name]()
    set_uniform_grid(scheduler, 20)
    noise = seeded_normal(50, 5, 4)
    end = integrate(scheduler, gaussian_velocity("linear"), noise)
    assert (end - (MEAN + STD * noise)).abs().max() < bound


# Golden trajectories of the authors' code


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "sit" / "io.safetensors")


@pytest.fixture(scope="module")
def transformer():
    return convert_transformer(GOLDEN / "sit")


@torch.no_grad()
def golden_run(scheduler, transformer, golden, guidance_scale=1.0, interval=(0.0, 1.0), noise=None):
    """Twelve steps from the golden noise, guided by hand inside the interval."""
    labels = golden["class_labels"]
    null_labels = torch.full_like(labels, transformer.config.num_classes)
    # diffusers' own schedulers keep a state of the model's float32
    is_ours = isinstance(scheduler, FlowMatchEulerMaruyamaScheduler)
    sample = golden["noise"].double() if is_ours else golden["noise"]
    for i, timestep in enumerate(scheduler.timesteps):
        time = scheduler.sigmas[i].item()
        t = torch.full((len(labels),), time)
        velocity = transformer(sample.float(), t, labels).sample
        if guidance_scale != 1 and interval[0] <= time <= interval[1]:
            null_velocity = transformer(sample.float(), t, null_labels).sample
            velocity = null_velocity + guidance_scale * (velocity - null_velocity)
        kwargs = {"noise": noise[i] if i < len(noise) else None} if is_ours else {}
        sample = scheduler.step(velocity, timestep, sample, **kwargs).prev_sample
    return sample


@pytest.mark.parametrize(
    ("name", "expected", "guidance"),
    [("euler", "out_euler", ()), ("heun", "out_heun", ()), ("euler", "out_euler_cfg", (1.9, (0.0, 0.75)))],
)
def test_golden_ode_trajectories(name, expected, guidance, transformer, golden):
    scheduler = ODE_SCHEDULERS[name]()
    set_uniform_grid(scheduler, 12)
    actual = golden_run(scheduler, transformer, golden, *guidance)
    torch.testing.assert_close(actual.double(), golden[expected], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "name", "guidance"),
    [
        ("linear", "sde_linear", ()),
        ("linear", "sde_linear_cfg", (1.5, (0.0, 0.7))),
        ("cosine", "sde_cosine_cfg", (1.5, (0.1, 0.9))),
    ],
)
def test_golden_sde_trajectories(path, name, guidance, transformer, golden):
    scheduler = FlowMatchEulerMaruyamaScheduler(path=path)
    scheduler.set_timesteps(12)
    actual = golden_run(scheduler, transformer, golden, *guidance, noise=golden[f"noise_{name}"])
    torch.testing.assert_close(actual, golden[f"out_{name}"], rtol=0, atol=1e-5)
