"""Distances of features: closed forms, invariances, and the numbers of independent programs."""

import numpy as np
import pytest
import torch

from maetok_hf.evaluation import (
    Moments,
    feature_moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)
from maetok_hf.moments import RunningMoments


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments_of(features):
    running = RunningMoments.zeros(features.shape[1])
    running.update(features)
    return feature_moments(running)


def mixed(count, dim, seed, shift=0.0):
    """Correlated features."""
    return normal(count, dim, seed=seed) @ normal(dim, dim, seed=seed + 100) / dim**0.5 + shift


@pytest.fixture
def two_sets():
    return mixed(150, 16, 0), mixed(120, 16, 1, shift=0.3)


@pytest.mark.parametrize("count", [300, 12])
def test_frechet_distance_of_a_set_to_itself_is_zero(count):
    moments = moments_of(mixed(count, 40, 0, shift=3))  # 12 samples: a covariance of rank 11
    assert frechet_distance(moments, moments) < 1e-10


def test_frechet_distance_of_known_gaussians_is_the_closed_form():
    mean, first, second = normal(5), normal(5, seed=1).square() + 0.1, normal(5, seed=2).square() + 0.1
    rotation = torch.linalg.qr(normal(5, 5, seed=3))[0]
    expected = mean.square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    gaussians = [
        Moments(center, rotation @ torch.diag(variance) @ rotation.T)
        for center, variance in ((torch.zeros(5, dtype=torch.float64), first), (mean, second))
    ]
    assert frechet_distance(*gaussians) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_samples_approaches_that_of_their_gaussians():
    first, second = normal(200_000, 2) * torch.tensor([1.0, 2.0]), normal(200_000, 2, seed=1) + torch.tensor([0.0, 1])
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(1 + 0 + 1, rel=0.02)


def test_frechet_distance_is_that_of_scipy(two_sets):
    linalg = pytest.importorskip("scipy.linalg")
    first, second = (features.numpy() for features in two_sets)
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    difference = first.mean(axis=0) - second.mean(axis=0)
    expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = frechet_distance(moments_of(two_sets[0]), moments_of(two_sets[1]))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx(frechet_distance(moments_of(two_sets[1]), moments_of(two_sets[0])), rel=1e-12)


def test_frechet_distance_with_fewer_samples_than_features_is_exact():
    first, second = mixed(20, 50, 0), mixed(30, 50, 1)
    centered = [(features - features.mean(dim=0)) / (len(features) - 1) ** 0.5 for features in (first, second)]
    # tr (S1 S2)^(1/2) of S = X^T X is the nuclear norm of X1 X2^T, a small matrix without any root
    cross = torch.linalg.matrix_norm(centered[0] @ centered[1].T, "nuc")
    expected = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    expected += sum(part.square().sum() for part in centered) - 2 * cross
    assert frechet_distance(moments_of(first), moments_of(second)) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_does_not_see_a_rotation_of_both(two_sets):
    rotation = torch.linalg.qr(normal(16, 16, seed=5))[0]
    plain = frechet_distance(*(moments_of(features) for features in two_sets))
    rotated = frechet_distance(*(moments_of(features @ rotation) for features in two_sets))
    assert rotated == pytest.approx(plain, rel=1e-10)


def test_frechet_distance_of_different_extractors_is_refused():
    with pytest.raises(ValueError, match="`first` has 2 features but `second` 3"):
        frechet_distance(moments_of(normal(9, 2)), moments_of(normal(9, 3)))


def test_kernel_distance_of_a_few_numbers():
    # off-diagonal kernels: (0, 1) 1; (1, 2) 27; between the sets 1, 1, 8, 27
    first, second = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    assert kernel_distance(first, second) == pytest.approx(1 + 27 - 2 * 37 / 4, rel=1e-14)


def test_kernel_distance_is_that_of_piq():
    piq = pytest.importorskip("piq")
    first, second = mixed(60, 16, 0), mixed(60, 16, 1, shift=0.3)
    expected = float(piq.KID().compute_metric(first, second))
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_sets_of_different_sizes_is_the_plain_sum(two_sets):
    first, second = (features.numpy() for features in two_sets)
    kernels = [(a @ b.T / 16 + 1) ** 3 for a, b in ((first, first), (second, second), (first, second))]
    within = [(kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1)) for kernel in kernels[:2]]
    assert kernel_distance(*two_sets) == pytest.approx(sum(within) - 2 * kernels[2].mean(), rel=1e-10)


def test_kernel_distance_depends_neither_on_blocks_nor_on_order(two_sets):
    first, second = two_sets
    whole = kernel_distance(first, second)
    for chunk_size in (1, 7, 100):
        assert kernel_distance(first, second, chunk_size=chunk_size) == pytest.approx(whole, rel=1e-10)
    assert kernel_distance(first.flip(0), second.roll(5, 0)) == pytest.approx(whole, rel=1e-10)
    assert kernel_distance(second, first) == pytest.approx(whole, rel=1e-10)


def test_kernel_distance_has_no_bias():
    # of two draws from one Gaussian it is 0 on average, where FID is not
    values = [kernel_distance(normal(20, 4, seed=2 * seed), normal(20, 4, seed=2 * seed + 1)) for seed in range(200)]
    mean, error = np.mean(values), np.std(values) / len(values) ** 0.5
    assert abs(mean) < 3 * error
    assert min(values) < 0


def test_kernel_distance_of_subsets_gives_the_numbers_of_torch_fidelity(two_sets):
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    expected = metric.kid_features_to_metric(
        *two_sets, kid_subsets=7, kid_subset_size=50, rng_seed=2020, verbose=False
    )
    mean, deviation = kernel_distance_of_subsets(*two_sets, num_subsets=7, subset_size=50)
    assert mean == pytest.approx(expected[metric.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert deviation == pytest.approx(expected[metric.KEY_METRIC_KID_STD], rel=1e-9)


def test_kernel_distance_of_subsets_as_large_as_the_sets_is_that_of_the_sets():
    first, second = mixed(40, 8, 0), mixed(40, 8, 1)
    mean, deviation = kernel_distance_of_subsets(first, second, num_subsets=3, subset_size=40)
    assert mean == pytest.approx(kernel_distance(first, second), rel=1e-10)
    assert deviation < 1e-12


def test_kernel_distance_refuses_sets_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shapes \(m, dim\) and \(n, dim\), got \(4, 2\) and \(4, 3\)"):
        kernel_distance(normal(4, 2), normal(4, 3))
    with pytest.raises(ValueError, match="two samples of each set, got 4 and 1"):
        kernel_distance(normal(4, 2), normal(1, 2))
    with pytest.raises(ValueError, match="from 2 to the size of the smaller set, 4, .* got 5 and 100"):
        kernel_distance_of_subsets(normal(4, 2), normal(9, 2), subset_size=5)


def certain(classes, num_classes=4):
    """Logits of a network that has no doubt."""
    return 50 * torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


@pytest.fixture
def scorer():
    pytest.importorskip("torch_fidelity")
    return inception_score


def test_inception_score_is_the_number_of_classes_of_certain_and_balanced_images(scorer):
    assert scorer(certain([0, 1, 2, 3] * 5)) == pytest.approx((4, 0), abs=1e-12)
    assert scorer(certain([2] * 9)) == pytest.approx((1, 0), abs=1e-12)
    assert scorer(torch.zeros(9, 4)) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_is_the_mean_over_consecutive_splits_the_last_one_smaller(scorer):
    logits = certain([0, 1, 2, 3, 0, 0])
    assert scorer(logits, split_size=4) == pytest.approx((2.5, 1.5), abs=1e-12)
    # not shuffled: of images sorted by class each split has one
    assert scorer(certain([0, 0, 1, 1, 2, 2, 3, 3]), split_size=2) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_is_the_formula(scorer):
    logits = normal(30, 7) * 2
    scores = []
    for part in (logits[:20], logits[20:]):
        p = np.exp(part.numpy()) / np.exp(part.numpy()).sum(axis=1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    assert scorer(logits, split_size=20) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    with pytest.raises(ValueError, match=r"got \(0, 7\) and 5000"):
        scorer(logits[:0])


@pytest.fixture
def neighborhoods():
    pytest.importorskip("torch_fidelity")
    return precision_recall


def test_precision_and_recall_of_a_few_numbers(neighborhoods):
    # one neighbour: balls [-1, 1], [0, 2], [1, 5] of the reference, [4, 6], [5, 7], [6, 8] of the generated ones
    reference, generated = torch.tensor([[0.0], [1], [3]]), torch.tensor([[5.0], [6], [7]])
    assert neighborhoods(generated, reference, num_neighbors=1) == pytest.approx((1 / 3, 0))
    assert neighborhoods(reference, generated, num_neighbors=1) == pytest.approx((0, 1 / 3))


def test_precision_and_recall_are_those_of_prdc(neighborhoods):
    prdc = pytest.importorskip("prdc")
    generated, reference = normal(150, 16), normal(110, 16, seed=1) * 0.9 + 0.3
    expected = prdc.compute_prdc(reference.numpy(), generated.numpy(), nearest_k=3)
    found = neighborhoods(generated, reference)
    assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-6)
    assert 0.1 < min(found) < max(found) - 0.05 < 0.9


def test_precision_and_recall_of_a_set_and_itself_are_one(neighborhoods):
    features = normal(80, 32)
    assert neighborhoods(features, features.clone()) == (1, 1)
    assert neighborhoods(features, features + 100) == (0, 0)


def test_images_of_one_mode_are_precise_but_have_no_recall(neighborhoods):
    reference = torch.cat([normal(60, 8), normal(60, 8, seed=1) + 20])
    precision, recall = neighborhoods(normal(60, 8, seed=2) * 0.7, reference)
    assert precision > 0.9
    assert recall < 0.55


def test_precision_and_recall_depend_neither_on_blocks_nor_on_order(neighborhoods):
    generated, reference = mixed(90, 16, 0).float(), mixed(70, 16, 0, shift=0.5).float()
    whole = neighborhoods(generated, reference)
    for max_bytes in (1, 8 * 90 * 11, 8 * 90 * 1000):
        assert neighborhoods(generated, reference, max_bytes=max_bytes) == whole
    assert neighborhoods(generated.flip(0), reference.roll(7, 0)) == whole


def test_precision_refuses_more_neighbours_than_samples(neighborhoods):
    with pytest.raises(ValueError, match="below the size of the smaller set, 3, got 3"):
        neighborhoods(normal(9, 2), normal(3, 2))


def test_numbers_that_are_not_finite_are_refused(scorer, neighborhoods, two_sets):
    first, second = two_sets
    broken = first.clone()
    broken[7, 3] = torch.nan
    functions = (kernel_distance, kernel_distance_of_subsets, neighborhoods)
    for function in functions:
        for sets in ((broken, second), (second, broken)):
            with pytest.raises(ValueError, match="must be finite"):
                function(*sets, **({"subset_size": 10} if function is kernel_distance_of_subsets else {}))
    with pytest.raises(ValueError, match="`logits` must be finite"):
        scorer(broken)
    with pytest.raises(ValueError, match="`second` has a mean or a covariance that is not finite"):
        frechet_distance(moments_of(first), moments_of(broken))
