"""The linear probe reaches the one minimum of its objective, whatever the scale and place of the latents."""

import numpy as np
import pytest
import torch

from maetok_hf.analysis import collect_latents, fit_linear_probe, linear_probe


NUM_CLASSES = 4


def clusters(num_images: int, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping clusters of latents (num_images, 3 tokens, 5 channels), the same centres for every seed."""
    centres = torch.randn(NUM_CLASSES, 3, 5, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_images) % NUM_CLASSES
    return centres[labels] + spread * torch.randn(num_images, 3, 5, generator=generator), labels


def test_an_optimum_known_in_closed_form_is_found():
    # One feature of values -1 and 1 that is the class: by symmetry W = (-w, w) and b = 0, where the derivative
    # 2 sigma(-2 w) = 2 l2 w vanishes; w = 1 for this l2.
    latents, labels = torch.tensor([[-1.0], [1.0]]).repeat(3, 1), torch.tensor([0, 1]).repeat(3)
    l2 = torch.sigmoid(torch.tensor(-2.0, dtype=torch.float64)).item()
    probe = fit_linear_probe(latents, labels, 2, l2=l2, tolerance=1e-9)
    assert probe.converged
    torch.testing.assert_close(probe.weight, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(probe.bias, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-8)
    cross_entropy = np.log1p(np.exp(-2))
    assert probe.cross_entropy(latents, labels) == pytest.approx(cross_entropy, abs=1e-8)
    assert probe.objective == pytest.approx(cross_entropy + l2, abs=1e-8)  # (l2 / 2) (1 + 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_it_equals_logistic_regression_of_scikit_learn(dtype, tolerance, l2):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    latents, labels = clusters(300)
    held_out, held_out_labels = clusters(200, seed=1)
    scaler = StandardScaler().fit(latents.flatten(1).double().numpy())
    reference = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-9, max_iter=10_000)
    reference.fit(scaler.transform(latents.flatten(1).double().numpy()), labels.numpy())
    expected = reference.predict_proba(scaler.transform(held_out.flatten(1).double().numpy()))

    probe = fit_linear_probe(latents, labels, NUM_CLASSES, l2=l2, dtype=dtype, tolerance=tolerance)
    assert probe.converged
    probabilities = probe.logits(held_out).softmax(dim=1)
    assert probabilities.dtype == dtype
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=0, atol=100 * tolerance)
    log_likelihood = np.log(expected[np.arange(200), held_out_labels.numpy()])
    assert probe.cross_entropy(held_out, held_out_labels) == pytest.approx(-log_likelihood.mean(), abs=1e-4)
    assert probe.accuracy(held_out, held_out_labels) == (expected.argmax(1) == held_out_labels.numpy()).mean()
    second = (np.argsort(-expected, axis=1)[:, :2] == held_out_labels.numpy()[:, None]).any(1).mean()
    assert probe.accuracy(held_out, held_out_labels, top_k=2) == second
    assert probe.accuracy(held_out, held_out_labels, top_k=NUM_CLASSES) == 1


def test_rescaled_and_shifted_channels_change_nothing():
    latents, labels = clusters(200)
    held_out, _ = clusters(50, seed=1)
    scale = torch.tensor([1e-3, -1.0, 5.0, 1e4, 0.3])
    shift = torch.tensor([10.0, -1e3, 0.0, 7.0, 1e-2])
    probe = fit_linear_probe(latents.double(), labels, NUM_CLASSES)
    rescaled = fit_linear_probe(latents.double() * scale + shift, labels, NUM_CLASSES)
    assert rescaled.objective == pytest.approx(probe.objective, rel=1e-9)
    torch.testing.assert_close(rescaled.logits(held_out.double() * scale + shift), probe.logits(held_out))


def test_constant_features_change_nothing():
    latents, labels = clusters(200)
    constant = torch.full((200, 3, 1), 0.1)
    probe = fit_linear_probe(latents, labels, NUM_CLASSES)
    with_constant = fit_linear_probe(torch.cat([latents, constant], dim=2), labels, NUM_CLASSES)
    assert with_constant.objective == pytest.approx(probe.objective, abs=1e-7)
    assert with_constant.std.reshape(3, 6)[:, 5].tolist() == [1, 1, 1]
    assert with_constant.weight.reshape(NUM_CLASSES, 3, 6)[..., 5].abs().max() == 0


def test_labels_that_are_shuffled_are_predicted_at_chance():
    latents, labels = clusters(400)
    held_out, held_out_labels = clusters(400, seed=1)
    assert fit_linear_probe(latents, labels, NUM_CLASSES).accuracy(held_out, held_out_labels) > 0.8
    accuracies, cross_entropies = [], []
    for seed in range(8):
        shuffled = labels[torch.randperm(400, generator=torch.Generator().manual_seed(seed))]
        probe = fit_linear_probe(latents, shuffled, NUM_CLASSES, l2=0.1)
        accuracies.append(probe.accuracy(held_out, held_out_labels))
        cross_entropies.append(probe.cross_entropy(held_out, held_out_labels))
    assert np.mean(accuracies) == pytest.approx(1 / NUM_CLASSES, abs=0.05)
    assert np.mean(cross_entropies) == pytest.approx(np.log(NUM_CLASSES), abs=0.1)


def test_chunks_give_the_result_of_the_whole(monkeypatch):
    latents, labels = clusters(203)
    whole = fit_linear_probe(latents, labels, NUM_CLASSES)
    monkeypatch.setattr(linear_probe, "_CHUNK_NUMEL", 10 * 15)
    parts = fit_linear_probe(latents, labels, NUM_CLASSES)
    assert {len(part) for part, _ in linear_probe._chunks(latents.flatten(1), labels, 4, "cpu")} == {10, 3}
    assert {len(part) for part, _ in linear_probe._chunks(latents.flatten(1), labels, 30, "cpu")} == {5, 3}
    assert parts.objective == pytest.approx(whole.objective, rel=1e-10)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=1e-6)
    assert parts.accuracy(latents, labels) == whole.accuracy(latents, labels)
    assert parts.cross_entropy(latents, labels) == pytest.approx(whole.cross_entropy(latents, labels), rel=1e-6)


def test_it_draws_nothing_and_repeats_bit_for_bit():
    latents, labels = clusters(100)
    latents.requires_grad_()
    before = torch.get_rng_state()
    first = fit_linear_probe(latents, labels, NUM_CLASSES)
    assert latents.grad is None
    with torch.no_grad():  # what the caller has switched off is not the probe's business
        again = fit_linear_probe(latents, labels, NUM_CLASSES)
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert torch.equal(before, torch.get_rng_state())
    assert not first.weight.requires_grad and not first.bias.requires_grad


def test_low_precision_latents_are_probed_in_full_precision():
    latents, labels = clusters(100)
    low = fit_linear_probe(latents.bfloat16(), labels.to(torch.int32), NUM_CLASSES)
    assert low.objective == fit_linear_probe(latents.bfloat16().float(), labels, NUM_CLASSES).objective


def test_a_class_without_training_latents_is_never_predicted():
    latents, labels = clusters(100)
    probe = fit_linear_probe(latents, labels, NUM_CLASSES)
    with_absent = fit_linear_probe(latents, labels, NUM_CLASSES + 2)
    assert with_absent.converged and with_absent.objective == pytest.approx(probe.objective, abs=1e-8)
    torch.testing.assert_close(with_absent.logits(latents)[:, :NUM_CLASSES], probe.logits(latents))
    assert (with_absent.logits(latents)[:, NUM_CLASSES:] == -torch.inf).all()
    assert with_absent.accuracy(latents, torch.full_like(labels, NUM_CLASSES)) == 0


def test_stopping_early_is_said(caplog):
    latents, labels = clusters(100)
    probe = fit_linear_probe(latents, labels, NUM_CLASSES, max_iterations=2)
    assert not probe.converged and probe.iterations == 2 and probe.gradient > 1e-6
    assert "stopped after 2 iterations" in caplog.text
    assert probe.objective < np.log(NUM_CLASSES)  # that of zero weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 4])}, r"`labels` must lie in \[0, 4\).*from 0 to 4"),
        ({"labels": torch.tensor([0, 1, -1, 3])}, r"from -1 to 3: leave out images without a class"),
        ({"labels": torch.tensor([2, 2, 2, 2])}, "all of class 2"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0, 3.0])}, "`labels` must be integers, got torch.float32"),
        ({"labels": torch.tensor([0, 1, 2])}, r"got \(4, 2, 3\) and \(3,\)"),
        ({"latents": torch.randn(4)}, r"got \(4,\) and \(4,\)"),
        ({"latents": torch.randn(0, 3), "labels": torch.zeros(0, dtype=torch.int64)}, "at least one image"),
        ({"latents": torch.zeros(4, 3, dtype=torch.uint8)}, "must be floating-point numbers, got torch.uint8"),
        ({"latents": torch.tensor([[0.0], [1.0], [float("nan")], [2.0]])}, "`latents` are not finite"),
        ({"latents": torch.tensor([[0.0], [1.0], [float("inf")], [2.0]])}, "`latents` are not finite"),
        ({"l2": 0.0}, "`l2` must be positive, got 0.0"),
        ({"tolerance": -1.0}, "`tolerance` must be positive"),
        ({"max_iterations": 0}, "`max_iterations` must be positive"),
        ({"dtype": torch.bfloat16}, "`dtype` must be torch.float32 or torch.float64, got torch.bfloat16"),
    ],
)
def test_what_cannot_be_probed_is_refused(change, message):
    generator = torch.Generator().manual_seed(0)
    arguments = {"latents": torch.randn(4, 2, 3, generator=generator), "labels": torch.arange(4), "num_classes": 4}
    fit_linear_probe(**arguments)
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(**arguments | change)


def test_what_does_not_fit_the_probe_is_refused():
    latents, labels = clusters(20)
    probe = fit_linear_probe(latents, labels, NUM_CLASSES)
    with pytest.raises(ValueError, match="have 14 features, but the probe was fitted to 15"):
        probe.accuracy(latents.flatten(1)[:, :14], labels)
    with pytest.raises(ValueError, match=r"`top_k` must lie in \[1, 4\].*got 5"):
        probe.accuracy(latents, labels, top_k=5)
    with pytest.raises(ValueError, match=r"got \(20, 3, 5\) and \(19,\)"):
        probe.cross_entropy(latents, labels[:19])


def test_collected_latents_are_in_order_in_memory_and_in_a_file(tmp_path):
    images, labels = clusters(10)
    images.requires_grad_()

    def batches():
        return zip(images.split(4), labels.to(torch.int32).split(4), strict=True)

    in_memory, classes = collect_latents(batches(), lambda batch: (2 * batch).double())
    assert in_memory.dtype == torch.float32 and classes.dtype == torch.int64
    assert torch.equal(in_memory, 2 * images) and torch.equal(classes, labels)
    assert not in_memory.requires_grad

    file = tmp_path / "latents"
    mapped, classes = collect_latents(batches(), lambda batch: 2 * batch, file)
    assert torch.equal(mapped, in_memory) and torch.equal(classes, labels)
    mapped.zero_()
    assert torch.equal(torch.from_file(str(file), size=150), in_memory.flatten())
    probe = fit_linear_probe(collect_latents(batches(), lambda batch: 2 * batch, file)[0], labels, NUM_CLASSES)
    assert probe.objective == fit_linear_probe(in_memory, labels, NUM_CLASSES).objective


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([(torch.zeros(3, 2), torch.zeros(2))], "3 latents for a batch of 2 classes"),
        ([(torch.zeros(2, 3), torch.zeros(2)), (torch.zeros(2, 4), torch.zeros(2))], r"shape \(4,\) after .* \(3,\)"),
    ],
)
@pytest.mark.parametrize("in_file", [False, True])
def test_batches_that_make_no_data_set_are_refused(tmp_path, batches, message, in_file):
    with pytest.raises(ValueError, match=message):
        collect_latents(batches, lambda batch: batch, tmp_path / "latents" if in_file else None)
