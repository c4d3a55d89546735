"""What is measured: against closed forms, and the same for any batch size."""

import json
import math
import types

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from maetok_hf.data import to_pixel_values
from maetok_hf.study import measures
from maetok_hf.study.classifier import ImageClassifier, train_classifier
from maetok_hf.study.images import Split
from maetok_hf.study.presets import Budget
from tests.pipelines.helpers import tiny_pipeline
from tests.study.small import NUM_CLASSES, SIZE, coloured_images
from tests.testing_utils import seeded_normal, tiny_autoencoder, tiny_transformer


EIGENVALUES = torch.tensor([0.05, 0.4, 1.0, 2.5])
BUDGET = Budget(
    tokenizer_steps=1,
    finetuning_steps=1,
    generator_steps=1,
    mixture_dimensions=4,
    mixture_sizes=(1, 2, 5, 20),
    mixture_size=5,
    mixture_seeds=(0, 1),
)


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(ImageClassifier(NUM_CLASSES, SIZE, "colour classifier"), *coloured_images(150), 8)


def split(count: int, seed: int = 0) -> Split:
    return Split(*coloured_images(count, seed), NUM_CLASSES)


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (count, 3 tokens, 2 channels) of five modes, and their modes as classes."""
    centres = 4 * seeded_normal(5, 3, 2, seed=99)
    labels = torch.arange(count) % 5
    return centres[labels] + seeded_normal(count, 3, 2, seed=seed), labels


def predicting(predict) -> torch.nn.Module:
    """A transformer that predicts `predict(noisy latents, times)`; it keeps the classes it was asked for."""
    model = tiny_transformer(sample_size=2, in_channels=2)
    model.asked = []

    def forward(hidden_states, timestep, class_labels, return_dict, class_drop_mask):
        assert not model.training and not class_drop_mask.any()
        model.asked.append(class_labels)
        return (predict(hidden_states, timestep[:, None, None]),)

    model.forward = forward
    return model


def test_the_loss_of_a_gaussian_is_the_integral_in_the_docstring():
    def integrand(t):
        return np.mean([value / ((1 - t) ** 2 * value + t**2) for value in EIGENVALUES.tolist()])

    assert measures.gaussian_loss(EIGENVALUES) == pytest.approx(quad(integrand, 0, 1)[0], rel=1e-6)
    assert measures.gaussian_loss(torch.ones(3)) == pytest.approx(math.pi / 2)
    assert measures.gaussian_loss(torch.tensor([4.0, -1e-9])) == pytest.approx(math.pi / 2), "rounding below zero"


def test_the_best_prediction_for_gaussian_latents_has_that_loss():
    """By the conditional expectation E[noise - data | x_t], which for a Gaussian is a multiple of x_t."""
    values = EIGENVALUES.reshape(2, 2)

    def best(noisy, t):
        return (t - (1 - t) * values) / ((1 - t) ** 2 * values + t**2) * noisy

    latents, labels = seeded_normal(500, 2, 2) * values.sqrt(), torch.zeros(500, dtype=torch.long)
    best_loss = measures.held_out_loss(predicting(best), latents, labels, num_draws=20, batch_size=250)
    assert best_loss == pytest.approx(measures.gaussian_loss(EIGENVALUES), rel=0.05)
    worse = measures.held_out_loss(predicting(lambda x, t: 0.9 * best(x, t)), latents, labels, 20, batch_size=250)
    assert worse > best_loss


def test_the_loss_of_nothing_is_that_of_the_target_for_any_batch_size():
    latents, labels = 2 * seeded_normal(300, 2, 2) + 1, torch.arange(300) % 10
    nothing = predicting(lambda noisy, t: torch.zeros_like(noisy))
    found = measures.held_out_loss(nothing, latents, labels, num_draws=8, batch_size=300)
    assert found == pytest.approx(1 + latents.square().mean().item(), rel=0.05)
    assert torch.equal(torch.cat(nothing.asked), labels.repeat(8))
    assert measures.held_out_loss(nothing, latents, labels, 8, batch_size=7) == pytest.approx(found, rel=1e-6)
    # the draws of an image are its own
    first = measures.held_out_loss(nothing, latents[:1], labels[:1], 1, batch_size=1)
    fewer = [measures.held_out_loss(nothing, latents[:2], labels[:2], 1, size) for size in (1, 2)]
    second = 2 * fewer[0] - first
    assert fewer[0] == pytest.approx(fewer[1], rel=1e-6) and second > 0
    assert measures.held_out_loss(nothing, latents[:1], labels[:1], 2, batch_size=1) != pytest.approx(first)


def test_the_distance_of_a_set_with_itself_is_zero_and_of_a_shift_its_square():
    features = seeded_normal(200, 6)
    assert measures.distance(features, features) == pytest.approx(0, abs=1e-6)
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    assert measures.distance(features, features + shift) == pytest.approx(25, rel=1e-5)
    covariance = torch.cov(features.double().T)
    assert measures.distance(features, 3 * features - 2 * features.mean(dim=0)) == pytest.approx(
        4 * covariance.trace().item(), rel=1e-4
    )


def test_latents_of_known_modes_are_measured_as_such():
    (train, train_labels), (held_out, labels) = clusters(300, seed=1), clusters(100, seed=2)
    found = measures.measure_latents(train, train_labels, held_out, labels, BUDGET)
    assert json.loads(json.dumps(found, allow_nan=False)) == found, "plain types"
    for name, dimensions in (("same", 4), ("own", 3)):  # three are the fewest with more than 90 %
        curve = found["mixtures"][name]
        nll = curve["held_out_nll"]
        assert list(nll) == ["1", "2", "5", "20"]
        assert nll["5"] < nll["2"] < nll["1"] and nll["5"] < nll["20"]
        assert nll["1"] == pytest.approx(curve["gaussian_held_out_nll"], rel=0.01)
        assert curve["num_dimensions"] == dimensions
    explained = [found["mixtures"][name]["explained_variance"] for name in ("same", "own")]
    assert 0.9 < explained[1] < explained[0] < 1
    assert found["shape"] == [3, 2]
    assert found["probe_accuracy"] > 0.95 and found["probe_cross_entropy"] < 0.2
    flat = train.flatten(1).double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(flat.T))
    assert found["gaussian_loss"] == pytest.approx(math.pi / 2 * eigenvalues.sqrt().mean().item(), rel=0.01)
    assert found["variance"] == pytest.approx(flat.var(dim=0).mean().item(), rel=0.01)
    assert 1 < found["effective_rank"] < 6 and 1 < found["channel_effective_rank"] <= 2


def test_latents_of_one_mode_gain_nothing_by_more():
    train, held_out = seeded_normal(300, 3, 2, seed=1), seeded_normal(100, 3, 2, seed=2)
    labels = torch.arange(300) % 4
    found = measures.measure_latents(train, labels, held_out, labels[:100], BUDGET)
    nll = found["mixtures"]["same"]["held_out_nll"]
    assert nll["1"] < nll["5"] < nll["20"]
    assert found["probe_accuracy"] < 0.45, "nothing to tell the classes by"
    assert found["gaussian_loss"] == pytest.approx(math.pi / 2, rel=0.05)


def test_latents_are_those_that_generators_see():
    tokenizer, images = tiny_autoencoder(sample_size=SIZE), split(7)
    found = measures.encode(tokenizer, images, batch_size=3)
    raw = tokenizer.encode(to_pixel_values(images.images, torch.device("cpu"))).latent
    torch.testing.assert_close(found, (raw - 0.1) / 1.5)
    torch.testing.assert_close(measures.encode(tokenizer, images, batch_size=7), found)


def test_reconstructions_are_rounded_and_compared_with_their_images(classifier):
    """A tokenizer that makes all images lighter by ten levels and a bit."""

    def lighter(pixels):
        return types.SimpleNamespace(sample=pixels + 10.3 / 127.5)

    lighter.device = torch.device("cpu")
    held_out = split(9)
    found = measures.measure_reconstruction(lighter, held_out, classifier, batch_size=4)
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / 10.3), rel=1e-4)
    features = [classifier.extract(images, 9)["pool"] for images in (held_out.images + 10, held_out.images)]
    assert found["distance"] == pytest.approx(measures.distance(*features), rel=1e-4)
    assert found["num_images"] == 9


def test_samples_that_are_real_images_are_perfect(classifier):
    images, labels = coloured_images(30)
    real = classifier.extract(images, 30)["pool"]
    found = measures.measure_samples(images, labels.tolist(), real, classifier, batch_size=7)
    assert found == {
        "distance": pytest.approx(0, abs=1e-4),
        "precision": 1.0,
        "recall": 1.0,
        "recognition": 1.0,
        "num_images": 30,
    }
    others = torch.where(torch.arange(30) < 10, labels, (labels + 1) % NUM_CLASSES).tolist()
    assert measures.measure_samples(images, others, real, classifier, 7)["recognition"] == pytest.approx(1 / 3)
    dark = measures.measure_samples(images // 8, labels.tolist(), real, classifier, 7)
    assert dark["distance"] > 10 * abs(found["distance"]) and dark["precision"] < 1


def test_samples_do_not_depend_on_the_batch(monkeypatch):
    pipe, labels = tiny_pipeline("sde"), [3, 1, 4, 1, 5]
    found = measures.sample(pipe, labels, num_inference_steps=2)
    assert found.dtype == torch.uint8 and found.shape == (5, 3, 32, 32)
    monkeypatch.setattr(measures, "SAMPLING_BATCH_SIZE", 2)
    again = measures.sample(pipe, labels, num_inference_steps=2)
    assert (again.int() - found.int()).abs().max() <= 1
    assert torch.equal(measures.sample(pipe, labels[:2], 2), again[:2]), "the first of more"
    assert not torch.equal(again[1], again[3]), "one class, two noises"


def test_seconds_are_added():
    found = measures.timed(lambda: {"a": 1})()
    assert found["a"] == 1 and found["seconds"] >= 0
