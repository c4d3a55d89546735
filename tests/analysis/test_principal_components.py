"""Principal components of chunks and of merged moments are those of scikit-learn on the whole."""

import numpy as np
import pytest
import torch

from maetok_hf.analysis.principal_components import fit_principal_components
from maetok_hf.analysis.rows import moments_of
from maetok_hf.analysis.spectrum import effective_rank
from maetok_hf.moments import RunningMoments


def latents(count: int = 120, seed: int = 0) -> torch.Tensor:
    """Correlated latents (count, 4 tokens, 5 channels) away from zero."""
    mixing = torch.randn(20, 20, generator=torch.Generator().manual_seed(99)) * 0.8 ** torch.arange(20)[:, None]
    noise = torch.randn(count, 20, generator=torch.Generator().manual_seed(seed))
    return (noise @ mixing + 5).view(count, 4, 5)


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99])
def test_they_equal_those_of_scikit_learn(variance):
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    train, held_out = latents(), latents(30, seed=1)
    flat, other = (x.flatten(1).double().numpy() for x in (train, held_out))
    reference = PCA(n_components=variance, svd_solver="full").fit(flat)
    scaler = StandardScaler().fit(reference.transform(flat))
    principal = fit_principal_components(train.split(17), variance)
    assert len(principal.components) == reference.n_components_
    assert principal.explained_variance == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-9)
    assert principal.explained_variance > variance
    signs = np.sign((principal.components.numpy() * reference.components_).sum(axis=1))
    coordinates = reference.transform(other)
    ours = principal.project(held_out, standardize=False).numpy()
    np.testing.assert_allclose(ours, coordinates * signs, rtol=0, atol=1e-9)
    np.testing.assert_allclose(
        principal.project(held_out).numpy(), scaler.transform(coordinates) * signs, rtol=0, atol=1e-9
    )
    singular = torch.linalg.svdvals(torch.from_numpy(flat - flat.mean(axis=0)))
    assert principal.effective_rank == pytest.approx(effective_rank(singular), rel=1e-9)


def test_no_smaller_number_of_components_holds_the_variance():
    train = latents()
    principal = fit_principal_components(train)
    fewer = fit_principal_components(train, num_components=len(principal.components) - 1)
    assert fewer.explained_variance <= 0.9 < principal.explained_variance


def test_axes_of_known_variance_are_found():
    # +-3 along (0, 1), +-2 along (1, 0): variances 9/2 and 2 of four samples
    data = torch.tensor([[0.0, 3.0], [0.0, -3.0], [2.0, 0.0], [-2.0, 0.0]]) + 7
    principal = fit_principal_components(data)
    torch.testing.assert_close(principal.variances, torch.tensor([4.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(principal.components, torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert len(fit_principal_components(data, 0.65).components) == 1  # 9 / 13 = 0.692
    assert len(fit_principal_components(data, 0.7).components) == 2


def test_standardised_training_latents_have_mean_zero_and_covariance_one():
    train = latents()
    projected = fit_principal_components(train).project(train)
    width = projected.shape[1]
    torch.testing.assert_close(projected.mean(dim=0), torch.zeros(width, dtype=torch.float64), rtol=0, atol=1e-10)
    covariance = projected.T @ projected / len(projected)
    torch.testing.assert_close(covariance, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-9)


def test_moments_of_several_processes_give_the_components_of_the_whole():
    train = latents()
    merged = RunningMoments.zeros(20)
    for part in train.split([3, 77, 40]):
        merged.merge(moments_of(part))
    whole, parts = fit_principal_components(train), fit_principal_components(merged)
    assert parts.count == 120
    torch.testing.assert_close(parts.components, whole.components, rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.variances, whole.variances, rtol=1e-10, atol=0)


def test_directions_without_variance_are_no_components():
    train = latents(6)
    principal = fit_principal_components(train, 0.999999999)
    assert len(principal.components) == 5
    assert (principal.variances > 0).sum() == 5
    assert principal.effective_rank < 5
    with pytest.raises(ValueError, match=r"must lie in \[1, 5\]"):
        fit_principal_components(train, num_components=6)


def test_what_has_no_components_is_refused():
    train = latents(10)
    for variance in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="`variance` must lie in"):
            fit_principal_components(train, variance)
    with pytest.raises(ValueError, match="must be different ones"):
        fit_principal_components(train[:1])
    with pytest.raises(ValueError, match="must be different ones"):
        fit_principal_components(train[:1].expand(5, 4, 5))
    with pytest.raises(ValueError, match="diagonal=False"):
        fit_principal_components(moments_of(train, diagonal=True))
    with pytest.raises(ValueError, match="20"):
        fit_principal_components(train).project(torch.zeros(2, 19))
