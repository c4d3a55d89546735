"""Mixtures of Gaussians: densities that integrate to one, fitted by scikit-learn's iteration in chunks of any size."""

import math
import warnings

import numpy as np
import pytest
import torch

from maetok_hf.analysis import rows
from maetok_hf.analysis.mixture import GaussianMixture, draw_mixture, fit_mixture


SIZE, WIDTH = 4, 3


def blobs(num_samples: int, seed: int = 0, spread: float = 1.0, distance: float = 3.0) -> torch.Tensor:
    """Overlapping clusters of correlated samples (num_samples, WIDTH), the same clusters for every seed."""
    fixed = torch.Generator().manual_seed(99)
    centres = distance * torch.randn(SIZE, WIDTH, generator=fixed, dtype=torch.float64)
    mixing = torch.randn(SIZE, WIDTH, WIDTH, generator=fixed, dtype=torch.float64)
    noise = torch.randn(num_samples, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    which = torch.arange(num_samples) % SIZE
    return centres[which] + spread * (noise[:, None] @ mixing[which])[:, 0]


def some_mixture(kind: str, seed: int = 1) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(SIZE, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.5 * torch.eye(WIDTH, dtype=torch.float64)
    return GaussianMixture(
        weights=torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64),
        means=2 * torch.randn(SIZE, WIDTH, generator=generator, dtype=torch.float64),
        covariances=covariances if kind == "full" else covariances.diagonal(dim1=1, dim2=2).clone(),
    )


def fit_with_scikit_learn(data: torch.Tensor, initial: GaussianMixture, kind: str, **settings):
    from sklearn.mixture import GaussianMixture as Reference

    covariances = initial.covariances.numpy()
    reference = Reference(
        n_components=SIZE,
        covariance_type=kind,
        weights_init=initial.weights.numpy(),
        means_init=initial.means.numpy(),
        precisions_init=np.linalg.inv(covariances) if kind == "full" else 1 / covariances,
        init_params="random_from_data",
        **settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, as it is meant to be
        return reference.fit(data.numpy())


@pytest.mark.parametrize("kind", ["diag", "full"])
@pytest.mark.parametrize(("iterations", "reg_covar"), [(1, 0.0), (8, 1e-6), (8, 0.3)])
def test_it_equals_scikit_learn_after_the_same_number_of_iterations(kind, iterations, reg_covar):
    data, held_out, initial = blobs(300), blobs(200, seed=1), some_mixture(kind)
    reference = fit_with_scikit_learn(data, initial, kind, reg_covar=reg_covar, tol=0.0, max_iter=iterations)
    fit = fit_mixture(data, initial, reg_covar=reg_covar, tolerance=0, max_iterations=iterations)
    assert fit.iterations == reference.n_iter_ == iterations
    assert not fit.converged
    assert fit.log_likelihoods[-1] == pytest.approx(reference.lower_bound_, rel=1e-9)
    for ours, theirs in [
        (fit.mixture.weights, reference.weights_),
        (fit.mixture.means, reference.means_),
        (fit.mixture.covariances, reference.covariances_),
        (fit.mixture.log_prob(held_out), reference.score_samples(held_out.numpy())),
        (fit.mixture.joint_log_prob(held_out).softmax(dim=1), reference.predict_proba(held_out.numpy())),
    ]:
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8, atol=1e-12)
    assert fit.mixture.score(held_out) == pytest.approx(reference.score(held_out.numpy()), rel=1e-10)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_it_converges_at_the_iteration_of_scikit_learn(kind):
    data, initial = blobs(300), some_mixture(kind)
    reference = fit_with_scikit_learn(data, initial, kind, tol=1e-3, max_iter=500)
    fit = fit_mixture(data, initial, tolerance=1e-3, max_iterations=500)
    assert fit.converged and reference.converged_
    assert fit.iterations == reference.n_iter_ > 3
    assert fit.mixture.score(data) == pytest.approx(reference.score(data.numpy()), rel=1e-8)


@pytest.mark.parametrize("kind", ["diag", "full"])
@pytest.mark.parametrize("initialization", ["kmeans++", "random"])
def test_chunks_of_any_size_give_the_result_of_the_whole(kind, initialization, monkeypatch):
    data = blobs(203)

    def fitted(chunks):
        initial = draw_mixture(chunks, SIZE, covariance=kind, initialization=initialization, seed=3)
        return fit_mixture(chunks, initial, tolerance=0, max_iterations=5)

    whole = fitted(data)
    monkeypatch.setattr(rows, "_CHUNK_NUMEL", 40)
    assert {len(part) for part in rows.iterate_rows(data, width=SIZE)} == {10, 3}
    for chunks in (data, data.split(7), lambda: iter(data.split(64))):
        parts = fitted(chunks)
        np.testing.assert_allclose(parts.log_likelihoods, whole.log_likelihoods, rtol=1e-11)
        for name in ("weights", "means", "covariances"):
            ours, theirs = getattr(parts.mixture, name), getattr(whole.mixture, name)
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert parts.mixture.score(chunks) == pytest.approx(whole.mixture.score(data), rel=1e-12)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_the_density_is_that_of_torch_and_integrates_to_one(kind):
    mixture, data = some_mixture(kind), blobs(50)
    covariances = mixture.covariances if kind == "full" else mixture.covariances.diag_embed()
    reference = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(mixture.weights),
        torch.distributions.MultivariateNormal(mixture.means, covariances),
    )
    torch.testing.assert_close(mixture.log_prob(data), reference.log_prob(data), rtol=1e-10, atol=1e-10)
    axis = torch.linspace(-20, 20, 81, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis, axis)
    assert mixture.log_prob(grid).exp().sum() * 0.5**3 == pytest.approx(1, abs=1e-3)


def test_one_component_is_the_gaussian_of_the_moments():
    data = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    fit = fit_mixture(data, draw_mixture(data, 1, covariance="diag"), reg_covar=0.5, max_iterations=2)
    assert fit.mixture.weights.tolist() == [1]
    torch.testing.assert_close(fit.mixture.means, torch.tensor([[2.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(fit.mixture.covariances, torch.tensor([[1.5, 4.5]], dtype=torch.float64))
    nll = math.log(2 * math.pi) + (math.log(1.5) + math.log(4.5) + 1 / 1.5 + 4 / 4.5) / 2
    assert -fit.mixture.score(data) == pytest.approx(nll, rel=1e-12)


@pytest.mark.parametrize("kind", ["diag", "full"])
@pytest.mark.parametrize("initialization", ["kmeans++", "random"])
def test_no_iteration_makes_the_training_samples_less_likely(kind, initialization):
    data = blobs(200)
    initial = draw_mixture(data, SIZE, covariance=kind, initialization=initialization)
    fit = fit_mixture(data, initial, reg_covar=0, tolerance=0, max_iterations=20)
    likelihoods = np.array([*fit.log_likelihoods, fit.mixture.score(data)])
    assert (np.diff(likelihoods) > -1e-12).all()
    assert likelihoods[-1] > likelihoods[0] + 0.01
    assert fit.mixture.weights.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_data_far_from_zero_is_fitted_as_well(kind):
    data = blobs(200)
    near, far = (
        fit_mixture(x, draw_mixture(x, SIZE, covariance=kind, seed=1), tolerance=0, max_iterations=10)
        for x in (data, data + 1e5)
    )
    np.testing.assert_allclose(far.log_likelihoods, near.log_likelihoods, rtol=1e-7)
    torch.testing.assert_close(far.mixture.means - 1e5, near.mixture.means, rtol=0, atol=1e-6)
    torch.testing.assert_close(far.mixture.covariances, near.mixture.covariances, rtol=1e-6, atol=1e-6)


def test_a_component_without_samples_keeps_its_place_and_loses_its_weight():
    start = some_mixture("diag")
    means = start.means.clone()
    means[2] = 1e4
    fit = fit_mixture(
        blobs(100), GaussianMixture(weights=start.weights, means=means, covariances=start.covariances), tolerance=0
    )
    torch.testing.assert_close(fit.mixture.means[2], means[2], rtol=1e-9, atol=0)
    assert fit.mixture.weights[2] < 1e-15
    assert math.isfinite(fit.mixture.score(blobs(100)))


def test_first_means_are_spread_over_separate_clusters():
    data = blobs(200, spread=0.01)
    for seed in range(5):
        initial = draw_mixture(data, SIZE, seed=seed)
        nearest = torch.cdist(data[:SIZE], initial.means).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(SIZE))
        assert initial.weights.tolist() == [0.25] * SIZE
        within = (data - initial.means[nearest.repeat(50)]).square().mean(dim=0)
        torch.testing.assert_close(initial.covariances, (within + 1e-6).repeat(SIZE, 1))


def test_each_sample_may_have_its_component():
    data = torch.arange(12, dtype=torch.float64).view(6, 2)
    initial = draw_mixture(data, 6)
    assert sorted(initial.means[:, 0].tolist()) == [0, 2, 4, 6, 8, 10]
    torch.testing.assert_close(initial.covariances, (data.var(dim=0, correction=0) + 1e-6).repeat(6, 1))


def test_random_responsibilities_leave_every_component_near_the_whole():
    data = blobs(2000)
    initial = draw_mixture(data, SIZE, covariance="full", initialization="random")
    torch.testing.assert_close(initial.weights, torch.full((SIZE,), 0.25, dtype=torch.float64), rtol=0.1, atol=0)
    assert (initial.means - data.mean(dim=0)).norm(dim=1).max() < 0.5
    torch.testing.assert_close(initial.weights @ initial.means, data.mean(dim=0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("initialization", ["kmeans++", "random"])
def test_draws_are_a_function_of_the_seed_alone(initialization):
    data = blobs(100)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = draw_mixture(data, SIZE, initialization=initialization, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(draw_mixture(data, SIZE, initialization=initialization, seed=5).means, first.means)
    assert not torch.equal(draw_mixture(data, SIZE, initialization=initialization, seed=6).means, first.means)


def test_a_fit_that_has_not_converged_says_so(caplog):
    fit = fit_mixture(blobs(100), some_mixture("diag"), tolerance=1e-9, max_iterations=2)
    assert not fit.converged
    assert "has not converged after 2 iterations" in caplog.text


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_a_component_that_collapses_is_reported(kind):
    data = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [100.0, 100.0]], dtype=torch.float64)
    initial = draw_mixture(data, 2, covariance=kind)
    with pytest.raises(ValueError, match="not positive definite: raise `reg_covar`"):
        fit_mixture(data, initial, reg_covar=0)


def test_what_cannot_be_fitted_is_refused():
    data, mixture = blobs(20), some_mixture("diag")
    constant = torch.cat([data, torch.full((20, 1), 0.1)], dim=1)
    broken = data.clone()
    broken[7, 1] = torch.nan
    for arguments, message in [
        ((data[:3], SIZE), "3 samples, fewer than the 4 components"),
        ((data[:2].repeat(4, 1), SIZE), "2 different samples"),
        ((broken, SIZE), "not finite"),
        ((data.long(), SIZE), "floating-point"),
        ((iter([data]), SIZE), "iterator, which can be gone through once"),
        ((data[:0], SIZE), "no samples"),
        ((data, 0), "`num_components` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_mixture(*arguments)
    for settings, message in [
        ({"covariance": "tied"}, "'diag' or 'full'"),
        ({"initialization": "zeros"}, "'kmeans\\+\\+' or 'random'"),
        ({"reg_covar": -1.0}, "must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            draw_mixture(data, SIZE, **settings)
    with pytest.raises(ValueError, match=r"Features \[3\] of `data` are constant"):
        draw_mixture(constant, SIZE, reg_covar=0)
    assert draw_mixture(constant, SIZE).covariances[:, 3].tolist() == [1e-6] * SIZE
    for settings in ({"reg_covar": -1.0}, {"tolerance": -1.0}, {"tolerance": math.nan}):
        with pytest.raises(ValueError, match="must not be negative"):
            fit_mixture(data, mixture, **settings)
    with pytest.raises(ValueError, match="`max_iterations` must be at least 1"):
        fit_mixture(data, mixture, max_iterations=0)
    with pytest.raises(ValueError, match="fewer than the 4 components"):
        fit_mixture(data[:3], mixture)
    with pytest.raises(ValueError, match="shape \\(num_rows, 3\\)"):
        fit_mixture(constant, mixture)
    with pytest.raises(ValueError, match="no samples"):
        mixture.score(data[:0])
    passes = iter([[data], [data[:9]]])
    with pytest.raises(ValueError, match="20 samples in the first pass and 9 in a later one"):
        fit_mixture(lambda: next(passes), mixture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.tensor([0.1, 0.2, 0.3, 0.3], dtype=torch.float64)}, "sum to 1"),
        ({"weights": torch.tensor([-0.1, 0.4, 0.3, 0.4], dtype=torch.float64)}, "not be negative"),
        ({"weights": torch.ones(1, dtype=torch.float64)}, "shape"),
        ({"means": torch.zeros(SIZE, WIDTH)}, "torch.float64"),
        ({"means": torch.full((SIZE, WIDTH), torch.inf, dtype=torch.float64)}, "finite"),
        ({"covariances": torch.zeros(SIZE, WIDTH, dtype=torch.float64)}, "not positive definite"),
        ({"covariances": -torch.eye(WIDTH, dtype=torch.float64).repeat(SIZE, 1, 1)}, "not positive definite"),
        ({"covariances": torch.ones(WIDTH, WIDTH, dtype=torch.float64)}, "shape"),
    ],
)
def test_parameters_that_are_no_density_are_refused(change, message):
    mixture = some_mixture("diag")
    parameters = {name: getattr(mixture, name) for name in ("weights", "means", "covariances")}
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**parameters | change)
