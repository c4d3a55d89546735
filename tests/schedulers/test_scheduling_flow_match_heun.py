import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from maetok_hf import FlowMatchHeunScheduler
from tests.schedulers.fields import MEAN, STD, gaussian_velocity, integrate
from tests.testing_utils import seeded_normal


def with_steps(num_inference_steps: int | None, **kwargs) -> FlowMatchHeunScheduler:
    scheduler = FlowMatchHeunScheduler(**{k: v for k, v in kwargs.items() if k != "sigmas"})
    scheduler.set_timesteps(num_inference_steps, sigmas=kwargs.get("sigmas"))
    return scheduler


def test_the_grid_is_uniform_and_visits_inner_times_twice():
    scheduler = with_steps(4)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0]))
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1])
    assert scheduler.num_inference_steps == 4


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_n_steps_take_2n_minus_one_evaluations(num_steps):
    evaluations = []

    def velocity(sample, t):
        evaluations.append(t)
        return gaussian_velocity("linear")(sample, t)

    integrate(with_steps(num_steps), velocity, seeded_normal(4))
    assert len(evaluations) == 2 * num_steps - 1


def test_it_is_the_textbook_method_with_an_euler_step_at_the_end():
    grid = [1.0, 0.7, 0.45, 0.1]
    velocity, sample = gaussian_velocity("linear"), seeded_normal(50)
    expected = sample
    for start, end in zip(grid, [*grid[1:], 0.0], strict=True):
        slope = velocity(expected, start)
        if end > 0:
            slope = (slope + velocity(expected + (end - start) * slope, end)) / 2
        expected = expected + (end - start) * slope
    torch.testing.assert_close(integrate(with_steps(None, sigmas=grid), velocity, sample), expected)


def test_it_is_of_second_order():
    """Doubling the steps divides the error of the whole run by four; Euler's by two."""
    sample, velocity = seeded_normal(50), gaussian_velocity("linear")
    exact = MEAN + STD * sample

    def error(scheduler, steps):
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).numpy())
        return (integrate(scheduler, velocity, sample) - exact).abs().max().item()

    heun = error(FlowMatchHeunScheduler(), 40) / error(FlowMatchHeunScheduler(), 80)
    euler = error(FlowMatchEulerDiscreteScheduler(), 40) / error(FlowMatchEulerDiscreteScheduler(), 80)
    assert 3.5 < heun < 4.5
    assert 1.7 < euler < 2.3


def test_shift_bends_the_grid():
    plain, shifted = with_steps(5).sigmas, with_steps(5, shift=3.0).sigmas
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_inference_steps": 0},
        {"sigmas": []},
        {"sigmas": [0.5, 0.9]},
        {"sigmas": [1.5, 0.5]},
        {"sigmas": [1.0, 0.0]},
        {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
    ],
    ids=str,
)
def test_a_bad_grid_is_refused(kwargs):
    with pytest.raises(ValueError, match="grid|num_inference_steps"):
        FlowMatchHeunScheduler().set_timesteps(**kwargs)


def test_a_new_run_forgets_a_run_that_was_cut_short():
    sample, velocity = seeded_normal(5), gaussian_velocity("linear")
    scheduler = with_steps(3)
    scheduler.step(velocity(sample, 1.0), scheduler.timesteps[0], sample)  # the corrector of this step never runs
    scheduler.set_timesteps(3)
    torch.testing.assert_close(
        integrate(scheduler, velocity, sample), integrate(with_steps(3), velocity, sample), rtol=0, atol=0
    )


def test_it_swaps_with_its_parent_and_is_saved_under_its_own_name(tmp_path):
    scheduler = FlowMatchHeunScheduler.from_config(FlowMatchHeunDiscreteScheduler(shift=2.0).config)
    assert scheduler.config.shift == 2
    scheduler.save_pretrained(tmp_path)
    assert '"_class_name": "FlowMatchHeunScheduler"' in (tmp_path / "scheduler_config.json").read_text()
    assert FlowMatchHeunScheduler.from_pretrained(tmp_path).config.shift == 2
