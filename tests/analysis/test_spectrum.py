"""Effective rank by its definition, and statistics of channels wherever their dimension is."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from maetok_hf.analysis.spectrum import channel_statistics, effective_rank


def tokens(num_images: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, -3.0, 10.0])
    return scale * torch.randn(num_images, 8, 3, generator=generator) + shift


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0),
        ([0.0, 7.0, 0.0], 1.0),
        ([2.0, 1.0, 1.0], 2**1.5),  # entropy of 1/2, 1/4, 1/4
        ([2e-9, 1e-9, 1e-9, 0.0], 2**1.5),
    ],
)
def test_the_effective_rank_is_the_exponential_of_the_entropy(values, rank):
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[1.0, 2.0]]])
def test_what_are_no_singular_values_is_refused(values):
    with pytest.raises(ValueError, match="`singular_values` must be a vector"):
        effective_rank(torch.tensor(values))


def test_channels_are_described_over_images_and_positions():
    latents = tokens()
    statistics = channel_statistics(latents)
    flat = latents.double().flatten(0, 1)
    assert statistics.count == 40 * 8
    assert statistics.mean == pytest.approx(flat.mean(dim=0).tolist(), rel=1e-12)
    assert statistics.std == pytest.approx(flat.std(dim=0, correction=0).tolist(), rel=1e-12)
    assert statistics.minimum == tuple(flat.amin(dim=0).tolist())
    assert statistics.maximum == tuple(flat.amax(dim=0).tolist())
    singular = torch.linalg.svdvals(flat - flat.mean(dim=0))
    assert statistics.effective_rank == pytest.approx(effective_rank(singular), rel=1e-10)
    assert json.loads(json.dumps(asdict(statistics)))["std"] == list(statistics.std)


def test_maps_of_channels_are_described_like_tokens():
    latents = tokens()
    maps = latents.transpose(1, 2).reshape(40, 3, 2, 4)
    by_tokens, by_maps = channel_statistics(latents.split(7)), channel_statistics(maps, channel_dim=1)
    assert by_maps.minimum == by_tokens.minimum and by_maps.maximum == by_tokens.maximum
    assert by_maps.mean == pytest.approx(by_tokens.mean, rel=1e-12)
    assert by_maps.effective_rank == pytest.approx(by_tokens.effective_rank, rel=1e-12)


def test_a_copied_or_constant_channel_adds_no_rank():
    latents = torch.randn(200, 8, 2, generator=torch.Generator().manual_seed(0))
    two = channel_statistics(latents).effective_rank
    assert two == pytest.approx(2, abs=0.01)
    constant = torch.cat([latents, torch.full((200, 8, 1), 0.3)], dim=2)
    assert channel_statistics(constant).effective_rank == pytest.approx(two, rel=1e-9)
    assert channel_statistics(constant).std[2] == 0
    # singular values sqrt(2), 1 of what were 1, 1
    copied = torch.cat([latents, latents[..., :1]], dim=2)
    expected = effective_rank(torch.tensor([2**0.5, 1.0]))
    assert channel_statistics(copied).effective_rank == pytest.approx(expected, rel=0.01)


def test_what_has_no_channels_is_refused():
    for channel_dim in (0, 3, -3, -4):
        with pytest.raises(ValueError, match="`channel_dim` must be a dimension"):
            channel_statistics(tokens(), channel_dim=channel_dim)
    with pytest.raises(ValueError, match="All channels of `latents` are constant"):
        channel_statistics(torch.ones(5, 4, 3))
    with pytest.raises(ValueError, match="no samples"):
        channel_statistics(torch.ones(0, 4, 3))
