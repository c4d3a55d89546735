import copy
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from maetok_hf import FlowMatchEulerMaruyamaScheduler
from maetok_hf.schedulers import PATHS
from tests.schedulers.fields import MEAN, STD, gaussian_velocity, integrate
from tests.testing_utils import seeded_normal


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zero_velocity(sample: torch.Tensor, t: float) -> torch.Tensor:
    return torch.zeros_like(sample)


def with_steps(num_inference_steps: int, **config) -> FlowMatchEulerMaruyamaScheduler:
    scheduler = FlowMatchEulerMaruyamaScheduler(**config)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler


# Grid


def test_the_grid_is_uniform_down_to_the_last_step():
    scheduler = with_steps(250)
    expected = np.append(np.linspace(1, 0.04, 250), 0)
    np.testing.assert_array_equal(scheduler.sigmas.numpy(), expected)
    assert scheduler.sigmas.dtype == torch.float64
    np.testing.assert_allclose(scheduler.timesteps.numpy(), 1000 * expected[:-1], rtol=1e-6)


def test_last_step_size_and_time_scale_are_configurable():
    scheduler = with_steps(5, last_step_size=0.2, num_train_timesteps=10)
    np.testing.assert_allclose(scheduler.sigmas, [1, 0.8, 0.6, 0.4, 0.2, 0])
    np.testing.assert_allclose(scheduler.timesteps, [10, 8, 6, 4, 2])


def test_one_step_goes_from_noise_to_data():
    assert with_steps(1).sigmas.tolist() == [1, 0]


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_shift_bends_the_grid_and_keeps_its_ends(shift):
    plain, shifted = with_steps(10).sigmas, with_steps(10, shift=shift).sigmas
    torch.testing.assert_close(shifted, shift * plain / (1 + (shift - 1) * plain))
    assert shifted[0] == 1 and shifted[-1] == 0
    assert (shifted[1:-1] > plain[1:-1]).all() == (shift > 1)


def test_a_custom_grid_is_given_as_sigmas_or_as_timesteps():
    by_sigmas, by_timesteps = FlowMatchEulerMaruyamaScheduler(), FlowMatchEulerMaruyamaScheduler()
    by_sigmas.set_timesteps(sigmas=[1.0, 0.5, 0.125])
    by_timesteps.set_timesteps(timesteps=[1000, 500, 125])
    for scheduler in (by_sigmas, by_timesteps):
        assert scheduler.sigmas.tolist() == [1, 0.5, 0.125, 0]
        assert scheduler.timesteps.tolist() == [1000, 500, 125]
        assert scheduler.num_inference_steps == 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_inference_steps": 0},
        {"num_inference_steps": -3},
        {"sigmas": []},
        {"sigmas": [1.0, 1.0]},
        {"sigmas": [0.5, 0.9]},
        {"sigmas": [1.5, 0.5]},
        {"sigmas": [1.0, 0.0]},
        {"sigmas": [1.0, float("nan")]},
        {"timesteps": [1.0, 2.0]},
        {"timesteps": [2000.0]},
        {"sigmas": [1.0], "timesteps": [1000]},
        {"sigmas": [1.0, 0.5], "num_inference_steps": 3},
    ],
    ids=str,
)
def test_a_bad_grid_is_refused(kwargs):
    with pytest.raises(ValueError, match="sigmas|grid|num_inference_steps"):
        FlowMatchEulerMaruyamaScheduler().set_timesteps(**kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("path", "vp"),
        ("shift", 0.0),
        ("shift", float("inf")),
        ("last_step_size", 0.0),
        ("last_step_size", 1.0),
        ("num_train_timesteps", 0),
    ],
)
def test_a_bad_configuration_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must .* got {value!r}"):
        FlowMatchEulerMaruyamaScheduler(**{name: value})


# The SDE


@pytest.mark.parametrize("path", PATHS)
def test_the_sde_carries_noise_to_the_data_distribution(path):
    scheduler = with_steps(250, path=path)
    samples = integrate(scheduler, gaussian_velocity(path), seeded_normal(40_000), generator(1))
    # four standard errors, and the discretisation's own bias (below 0.01 with 250 steps)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.01 + 4 * STD / 200)
    assert samples.std().item() == pytest.approx(STD, abs=0.01 + 4 * STD / 283)


@pytest.mark.parametrize("path", PATHS)
def test_the_noise_is_what_keeps_the_spread(path):
    """Without its noise the SDE's drift contracts the samples: the sampler is not an ODE in disguise."""
    scheduler = with_steps(250, path=path)
    sample = seeded_normal(1000)
    velocity = gaussian_velocity(path)
    for time, timestep in zip(scheduler.sigmas.tolist(), scheduler.timesteps, strict=False):
        output = velocity(sample, time)
        sample = scheduler.step(output, timestep, sample, noise=torch.zeros_like(sample)).prev_sample
    assert sample.std() < STD / 2


def test_a_step_has_drift_and_noise_of_the_published_size():
    """By hand on the linear path: the score is -((1 - t) v + x) / t and w = 2 t."""
    scheduler = FlowMatchEulerMaruyamaScheduler()
    scheduler.set_timesteps(sigmas=[0.8, 0.5])
    x, v, n = (seeded_normal(2, 6, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    score = -(0.2 * v + x) / 0.8
    expected = x + (v - 0.8 * score) * -0.3 + (2 * 0.8 * 0.3) ** 0.5 * n
    actual = scheduler.step(v, scheduler.timesteps[0], x, noise=n).prev_sample
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_generators_is_one_per_sample(count):
    sample = seeded_normal(2, 6, 4)
    scheduler = with_steps(3)
    with pytest.raises(ValueError, match=f"`generator` is a list of {count}, but there are 2 samples"):
        scheduler.step(sample, scheduler.timesteps[0], sample, generator=[generator(i) for i in range(count)])
    assert scheduler.step_index is None


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_n_steps_take_n_minus_one_draws(num_steps):
    used, reference = generator(), generator()
    shape = (2, 6, 4)
    integrate(with_steps(num_steps), zero_velocity, torch.zeros(shape), used)
    for _ in range(num_steps - 1):
        torch.randn(shape, generator=reference)
    assert torch.equal(used.get_state(), reference.get_state())


def test_the_last_step_adds_no_noise():
    scheduler = with_steps(3)
    scheduler.set_begin_index(2)
    velocity, sample = seeded_normal(2, 6, 4), seeded_normal(2, 6, 4, seed=1)
    outputs = [
        copy.deepcopy(scheduler).step(velocity, scheduler.timesteps[2], sample, noise=noise).prev_sample
        for noise in (torch.zeros_like(sample), torch.ones_like(sample))
    ]
    assert torch.equal(*outputs)


def test_given_noise_replaces_the_draw():
    noise = torch.randn(2, 6, 4, generator=generator())
    sample = seeded_normal(2, 6, 4, seed=1)
    drawn, given = with_steps(5), with_steps(5)
    timestep = drawn.timesteps[0]
    expected = drawn.step(sample, timestep, sample, generator=generator()).prev_sample
    assert torch.equal(given.step(sample, timestep, sample, noise=noise).prev_sample, expected)


def test_one_generator_per_sample_gives_the_samples_of_single_runs():
    start, velocity = seeded_normal(3, 6, 4), gaussian_velocity("linear")
    batch = integrate(with_steps(8), velocity, start, [generator(seed) for seed in range(3)])
    for index in range(3):
        single = integrate(with_steps(8), velocity, start[index : index + 1], [generator(index)])
        torch.testing.assert_close(batch[index : index + 1], single, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_dtype", "sample_dtype", "state_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
    ],
)
def test_the_state_is_float32_or_better(model_dtype, sample_dtype, state_dtype):
    scheduler = with_steps(4)
    sample = seeded_normal(1, 6, 4, dtype=sample_dtype)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample.to(model_dtype), timestep, sample, generator=generator()).prev_sample
        assert sample.dtype == state_dtype


def test_output_object_and_tuple_agree():
    sample = seeded_normal(1, 6, 4)
    scheduler = with_steps(4)
    output = scheduler.step(sample, scheduler.timesteps[0], sample, generator=generator())
    scheduler.set_timesteps(4)
    as_tuple = scheduler.step(sample, scheduler.timesteps[0], sample, generator=generator(), return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert torch.equal(output.prev_sample, as_tuple[0])


# Position in the schedule


def test_steps_are_counted_from_the_timestep_or_the_begin_index():
    sample = torch.zeros(1, 6, 4)
    scheduler = with_steps(5)
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.step(sample, scheduler.timesteps[2], sample)
    assert scheduler.step_index == 3

    scheduler.set_timesteps(5)
    assert scheduler.step_index is None
    scheduler.set_begin_index(1)
    scheduler.step(sample, scheduler.timesteps[1], sample)
    assert scheduler.step_index == 2


def test_index_for_timestep():
    scheduler = with_steps(5)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == [0, 1, 2, 3, 4]
    assert scheduler.index_for_timestep(3.0, torch.tensor([9.0, 3.0])) == 1
    with pytest.raises(ValueError, match="`timestep` 999.5 is not one of"):
        scheduler.index_for_timestep(999.5)


@pytest.mark.parametrize("timestep", [0, np.int64(1), torch.tensor(1), torch.tensor(1, dtype=torch.int32)])
def test_integer_timesteps_are_refused(timestep):
    with pytest.raises(ValueError, match="not an integer such as an index"):
        with_steps(4).step(torch.zeros(1, 6, 4), timestep, torch.zeros(1, 6, 4))


def test_a_step_beyond_the_end_is_refused():
    scheduler = with_steps(2)
    sample = integrate(scheduler, zero_velocity, torch.zeros(1, 6, 4))
    with pytest.raises(ValueError, match="all 2 steps are done"):
        scheduler.step(sample, scheduler.timesteps[1], sample)


def test_noise_of_another_shape_is_refused():
    scheduler = with_steps(2)
    sample = torch.zeros(2, 6, 4)
    with pytest.raises(ValueError, match=r"`noise` must have the shape of `sample`, \(2, 6, 4\), got \(1, 6, 4\)"):
        scheduler.step(sample, scheduler.timesteps[0], sample, noise=torch.zeros(1, 6, 4))


# The forward process


@pytest.mark.parametrize("path", PATHS)
def test_scale_noise_reaches_data_and_noise(path):
    scheduler = FlowMatchEulerMaruyamaScheduler(path=path)
    data, noise = seeded_normal(2, 6, 4), seeded_normal(2, 6, 4, seed=1)
    torch.testing.assert_close(scheduler.scale_noise(data, 0.0, noise), data)
    torch.testing.assert_close(scheduler.scale_noise(data, torch.tensor([1000.0]), noise), noise)


def test_scale_noise_takes_one_timestep_per_sample():
    data, noise = seeded_normal(2, 6, 4), seeded_normal(2, 6, 4, seed=1)
    noised = FlowMatchEulerMaruyamaScheduler().scale_noise(data, torch.tensor([250.0, 500.0]), noise)
    torch.testing.assert_close(noised[0], 0.75 * data[0] + 0.25 * noise[0])
    torch.testing.assert_close(noised[1], 0.5 * data[1] + 0.5 * noise[1])
    assert FlowMatchEulerMaruyamaScheduler().scale_noise(data.half(), 250.0, noise.half()).dtype == torch.float16


@pytest.mark.parametrize("timestep", [-1.0, 1000.5, float("nan")])
def test_scale_noise_refuses_times_off_the_path(timestep):
    with pytest.raises(ValueError, match=r"`timestep` must lie in \[0, 1000\]"):
        FlowMatchEulerMaruyamaScheduler().scale_noise(torch.zeros(1, 6, 4), timestep, torch.zeros(1, 6, 4))


# A diffusers scheduler


def test_save_and_load_keep_the_configuration(tmp_path):
    config = {"num_train_timesteps": 500, "shift": 2.0, "path": "cosine", "last_step_size": 0.1}
    FlowMatchEulerMaruyamaScheduler(**config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchEulerMaruyamaScheduler"
    loaded = FlowMatchEulerMaruyamaScheduler.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in config} == config


def test_it_swaps_with_the_flow_match_euler_scheduler():
    euler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0)
    sde = FlowMatchEulerMaruyamaScheduler.from_config(euler.config)
    assert (sde.config.num_train_timesteps, sde.config.shift, sde.config.path) == (500, 3.0, "linear")
    back = FlowMatchEulerDiscreteScheduler.from_config(sde.config)
    assert (back.config.num_train_timesteps, back.config.shift) == (500, 3.0)


def test_the_interface_that_pipelines_rely_on():
    scheduler = FlowMatchEulerMaruyamaScheduler()
    sample = seeded_normal(1, 6, 4)
    assert scheduler.scale_model_input(sample, 1.0) is sample
    assert scheduler.init_noise_sigma == 1 and scheduler.order == 1 and len(scheduler) == 1000
    assert scheduler.timesteps[0] == 1000 and scheduler.timesteps[-1] == 1
    with pytest.raises(AttributeError, match="'FlowMatchEulerMaruyamaScheduler' object has no attribute 'missing'"):
        _ = scheduler.missing
