import math

import pytest
import torch

from maetok_hf.seeding import keyed_generator
from maetok_hf.training.draws import draw_rows, sample_noise
from maetok_hf.training.masking import (
    linear_mask_ratio,
    sample_mask,
    sample_mask_ratio,
    sample_masks,
    sample_step_mask_ratio,
)


def normal_cdf(z):
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


@pytest.mark.parametrize(
    ("mean", "std", "low", "high"),
    [(0.6, 0.25, 0.4, 0.6), (0.6, 0.25, 0.0, 1.0), (0.75, 0.25, 0.5, 1.0), (0.2, 0.1, 0.4, 0.6)],
)
def test_mask_ratio_stays_in_its_interval_and_follows_the_truncated_normal(mean, std, low, high):
    generator = torch.Generator().manual_seed(0)
    ratios = sorted(sample_mask_ratio(generator, mean, std, low, high) for _ in range(4000))
    assert low <= ratios[0] and ratios[-1] <= high
    cdf_low, cdf_high = normal_cdf((low - mean) / std), normal_cdf((high - mean) / std)
    expected = [(normal_cdf((ratio - mean) / std) - cdf_low) / (cdf_high - cdf_low) for ratio in ratios]
    # Kolmogorov-Smirnov distance; 1.63 / sqrt(n) is its 1 % quantile
    distance = max(abs(cdf - (i + 0.5) / len(ratios)) for i, cdf in enumerate(expected))
    assert distance < 1.63 / math.sqrt(len(ratios))


def test_mask_ratio_is_the_inverse_cdf_of_one_uniform_draw():
    uniform = torch.rand((), generator=torch.Generator().manual_seed(3), dtype=torch.float64).item()
    ratio = sample_mask_ratio(torch.Generator().manual_seed(3), 0.6, 0.25, 0.4, 0.6)
    cdf_low, cdf_high = normal_cdf(-0.8), 0.5
    assert normal_cdf((ratio - 0.6) / 0.25) == pytest.approx(cdf_low + uniform * (cdf_high - cdf_low), abs=1e-12)


@pytest.mark.parametrize("bounds", [(0.4, 0.6), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0)])
def test_mask_ratio_always_takes_exactly_one_draw(bounds):
    generator, reference = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    sample_mask_ratio(generator, low=bounds[0], high=bounds[1])
    torch.rand((), generator=reference, dtype=torch.float64)
    assert torch.equal(generator.get_state(), reference.get_state())


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
def test_equal_bounds_fix_the_mask_ratio(ratio):
    assert sample_mask_ratio(torch.Generator().manual_seed(0), low=ratio, high=ratio) == ratio


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.7, "high": 0.6}, "`low` must not exceed `high`"),
        ({"low": -0.1}, r"`low` must be in \[0, 1\], got -0.1"),
        ({"high": 1.5}, r"`high` must be in \[0, 1\], got 1.5"),
        ({"low": float("nan")}, "`low` must be in"),
        ({"std": 0.0}, "`std` must be positive"),
        ({"mean": 50.0}, "no mass in"),
        ({"mean": -50.0}, "no mass in"),
    ],
)
def test_bad_mask_ratio_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_mask_ratio(torch.Generator(), **arguments)


@pytest.mark.parametrize(("num_tokens", "mask_ratio"), [(256, 0.5), (256, 0.40001), (17, 0.4), (9, 0.0), (9, 1.0)])
def test_mask_has_exactly_the_rounded_up_count(num_tokens, mask_ratio):
    mask = sample_mask(num_tokens, mask_ratio, torch.Generator().manual_seed(0))
    assert mask.shape == (num_tokens,) and mask.dtype == torch.bool
    assert mask.sum().item() == math.ceil(mask_ratio * num_tokens)


@pytest.mark.parametrize("num_tokens", [100, 256, 1024])
def test_rounding_of_floats_masks_no_further_patch(num_tokens):
    # 0.07 * 100 is 7.000000000000001
    for hundredths in range(101):
        mask = sample_mask(num_tokens, hundredths / 100, torch.Generator())
        assert mask.sum().item() == -(-hundredths * num_tokens // 100)


def test_every_subset_is_equally_likely():
    generator = torch.Generator().manual_seed(1)
    counts = {}
    for _ in range(6000):
        subset = tuple(sample_mask(4, 0.5, generator).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    assert len(counts) == 6
    # chi-square with 5 degrees of freedom: 20.5 is its 0.1 % quantile
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5


@pytest.mark.parametrize(("num_tokens", "mask_ratio"), [(0, 0.5), (-3, 0.5), (4, 1.01), (4, -0.01)])
def test_bad_mask_arguments_raise(num_tokens, mask_ratio):
    with pytest.raises(ValueError, match=r"`num_tokens`|`mask_ratio`"):
        sample_mask(num_tokens, mask_ratio, torch.Generator())


def test_mask_of_an_image_does_not_depend_on_its_batch():
    masks = sample_masks(7, 3, [10, 11, 12, 13], 64, 0.5)
    other = sample_masks(7, 3, torch.tensor([13, 99, 10]), 64, 0.5)
    assert torch.equal(masks[3], other[0]) and torch.equal(masks[0], other[2])
    assert torch.equal(masks[1], sample_mask(64, 0.5, keyed_generator(7, "mask", 3, 11)))


def test_masks_change_with_seed_step_and_image_but_not_with_global_random_state():
    masks = sample_masks(7, 3, [10, 11], 64, 0.5)
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks, sample_masks(8, 3, [10, 11], 64, 0.5))
    assert not torch.equal(masks, sample_masks(7, 4, [10, 11], 64, 0.5))
    state = torch.random.get_rng_state()
    torch.rand(5)
    assert torch.equal(masks, sample_masks(7, 3, [10, 11], 64, 0.5))
    torch.random.set_rng_state(state)
    sample_masks(7, 3, [10, 11], 64, 0.5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_step_mask_ratio_is_keyed_by_the_step():
    assert sample_step_mask_ratio(7, 3) == sample_mask_ratio(keyed_generator(7, "mask_ratio", 3))
    assert len({sample_step_mask_ratio(7, step) for step in range(20)}) == 20
    assert sample_step_mask_ratio(7, 3, low=0.2, high=0.2) == 0.2


def test_linear_mask_ratio_falls_from_start_to_end_and_stays():
    ratios = [linear_mask_ratio(step, 50_001) for step in (0, 12_500, 25_000, 50_000, 70_000)]
    assert ratios == pytest.approx([0.6, 0.45, 0.3, 0.0, 0.0], abs=1e-12)
    assert ratios[-1] == 0.0
    assert linear_mask_ratio(1, 3, start=0.2, end=0.8) == pytest.approx(0.5)


@pytest.mark.parametrize("num_tokens", [256, 1024])
def test_the_last_of_the_steps_of_the_fall_is_the_first_without_a_mask(num_tokens):
    counts = [math.ceil(linear_mask_ratio(step, 500) * num_tokens) for step in range(500)]
    assert counts[0] == math.ceil(0.6 * num_tokens) and counts == sorted(counts, reverse=True)
    assert counts.index(0) == 499
    assert not sample_masks(0, 499, [0], num_tokens, linear_mask_ratio(499, 500)).any()
    assert linear_mask_ratio(0, 1) == 0.0, "a single step has the end"


@pytest.mark.parametrize(("arguments", "name"), [((-1, 5), "step"), ((0, 0), "num_steps"), ((0, 5, 1.2), "start")])
def test_bad_linear_mask_ratio_arguments_raise(arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        linear_mask_ratio(*arguments)


def test_noise_is_keyed_by_purpose_and_standard_normal():
    noise = sample_noise(0, "a", 5, range(64), (16, 8))
    assert noise.shape == (64, 16, 8) and noise.dtype == torch.float32
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert torch.equal(noise[5:6], sample_noise(0, "a", 5, [5], (16, 8)))
    assert not torch.equal(noise[5:6], sample_noise(0, "b", 5, [5], (16, 8)))


@pytest.mark.parametrize("indices", [[], torch.zeros(2, 2, dtype=torch.long)])
def test_indices_must_be_a_list_of_images(indices):
    with pytest.raises(ValueError, match="`sample_indices`"):
        sample_masks(0, 0, indices, 4, 0.5)


def test_indices_must_be_integers():
    with pytest.raises(TypeError):
        draw_rows(lambda generator: torch.rand((), generator=generator), 0, "x", 0, torch.tensor([0.5]))


def test_uniform_density_spreads_evenly_over_the_same_bounds():
    ratios = [sample_step_mask_ratio(0, step, low=0.2, high=0.6, density="uniform") for step in range(2000)]
    assert min(ratios) < 0.21 and max(ratios) > 0.59
    assert abs(sum(ratios) / len(ratios) - 0.4) < 0.01
    assert sample_step_mask_ratio(0, 3, low=0.5, high=0.5, density="uniform") == 0.5


def test_unknown_density_is_an_error():
    with pytest.raises(ValueError, match="`density` must be one of 'truncated_normal', 'uniform', got 'flat'"):
        sample_step_mask_ratio(0, 0, density="flat")
