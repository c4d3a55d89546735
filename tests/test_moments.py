"""Moments of any division of the rows are those of the whole."""

import copy

import pytest
import torch

from maetok_hf.moments import RunningMoments


DIM = 6


def rows(count=50):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    # far from 0, where sums of squares would lose their digits
    return torch.randn(count, DIM, generator=generator, dtype=torch.float64) @ mixing + 1e4


def moments_of(*batches, diagonal=False):
    moments = RunningMoments.zeros(batches[0].shape[1], diagonal=diagonal)
    for batch in batches:
        moments.update(batch)
    return moments


def assert_moments(moments, data):
    centred = data - data.mean(dim=0)
    scatter = centred.square().sum(dim=0) if moments.scatter.ndim == 1 else centred.T @ centred
    assert moments.count == len(data)
    torch.testing.assert_close(moments.mean, data.mean(dim=0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.scatter, scatter, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moments.variance, data.var(dim=0, correction=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bounds", [(), (1,), (25,), (1, 2, 3, 49), (0, 40, 40), tuple(range(1, 50))])
def test_batches_of_any_size_give_the_moments_of_the_whole(bounds, diagonal):
    assert_moments(moments_of(*rows().tensor_split(bounds), diagonal=diagonal), rows())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bounds", [(1,), (30,), (0,), (20, 20, 45)])
def test_merged_parts_are_the_whole_and_stay_as_they_are(bounds, diagonal):
    parts = [moments_of(part, diagonal=diagonal) for part in rows().tensor_split(bounds)]
    before = copy.deepcopy(parts)
    assert_moments(RunningMoments.merged((part.state() for part in parts), diagonal=diagonal), rows())
    merged = RunningMoments.zeros(DIM, diagonal=diagonal)
    for part in parts:
        merged.merge(part)
    assert_moments(merged, rows())
    for part, earlier in zip(parts, before, strict=True):
        assert torch.equal(part.state(), earlier.state())


def test_order_of_rows_does_not_matter():
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert_moments(moments_of(rows()[order]), rows())


def test_float32_rows_are_summed_in_float64():
    values = torch.tensor([[2.0**24, 1.0], [2.0**24 + 2, -1.0], [2.0**24 + 4, 0.0]])
    moments = moments_of(*values[:, None])
    assert moments.mean.tolist() == [2.0**24 + 2, 0.0]
    assert moments.scatter.tolist() == [[8.0, -2.0], [-2.0, 2.0]]


def test_a_small_spread_around_a_large_mean_keeps_its_digits():
    spread = rows() - 1e4
    near, far = moments_of(spread), moments_of(*(spread + 2.0**26).split(9))
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_constant_feature_has_a_scatter_of_exactly_zero(diagonal):
    data = torch.cat([rows().float(), torch.full((50, 1), 0.1)], dim=1)
    moments = moments_of(*data.split(7), diagonal=diagonal)
    moments.merge(moments_of(data[:11], diagonal=diagonal))
    assert not moments.scatter[DIM].any()
    assert moments.mean[DIM] == torch.tensor(0.1).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_stay_as_they_are(dtype):
    data = rows().to(dtype)
    before = data.clone()
    moments = moments_of(data)
    moments.mean.zero_()
    assert torch.equal(data, before)


def test_what_does_not_fit_is_refused():
    moments = moments_of(rows())
    with pytest.raises(ValueError, match=r"`rows` must have shape \(num_rows, 6\), got \(2, 5\)"):
        moments.update(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="cannot be merged"):
        moments.merge(moments_of(rows(), diagonal=True))
    with pytest.raises(ValueError, match="at least one"):
        RunningMoments.merged([])
