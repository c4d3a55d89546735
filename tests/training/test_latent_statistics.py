"""Latent statistics equal those of all latents at once, however they are split."""

import pytest
import torch

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.training.latent_encoding import encode_tokens
from maetok_hf.training.latent_statistics import LatentStatistics, measure_latents, summarize_statistics
from tests.testing_utils import seeded_normal


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    # a large mean beside a small spread is where sums of squares lose their digits
    return torch.randn(50, 4, 3, generator=generator) * torch.tensor([0.1, 1.0, 2.0]) + torch.tensor([1e3, 0.0, -5.0])


def measure(batches):
    statistics = LatentStatistics(3)
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_statistics_equal_those_of_everything_at_once(latents, batch_size):
    statistics = measure(latents.split(batch_size))
    flat = latents.double().flatten(0, 1)
    mean, std = statistics.result("channel")
    assert mean == pytest.approx(flat.mean(0).tolist(), rel=1e-12)
    assert std == pytest.approx(flat.std(0, unbiased=False).tolist(), rel=1e-12)
    mean, std = statistics.result("scalar")
    assert mean == pytest.approx(flat.mean().item(), rel=1e-12)
    assert std == pytest.approx(flat.std(unbiased=False).item(), rel=1e-12)


def test_shares_of_several_processes_merge_into_the_whole(latents):
    whole = measure([latents])
    shares = [measure([latents[:20]]), measure([]), measure(latents[20:].split(9))]
    shares = torch.stack([share.state() for share in shares])
    merged = LatentStatistics.merged(shares)
    torch.testing.assert_close(merged.state(), whole.state(), rtol=1e-12, atol=1e-12)


def test_normalised_latents_have_zero_mean_and_unit_variance(latents):
    from maetok_hf.models.latents import normalize_latents

    mean, std = measure([latents]).result("channel")
    normalised = normalize_latents(latents.double(), {"latents_mean": mean, "latents_std": std}).flatten(0, 1)
    assert normalised.mean(0).tolist() == pytest.approx([0, 0, 0], abs=2e-3)
    assert normalised.std(0, unbiased=False).tolist() == pytest.approx([1, 1, 1], abs=1e-3)


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ([], "scalar", "No latents were added"),
        ([torch.ones(2, 4, 3)], "scalar", "do not vary"),
        ([torch.ones(2, 4, 3)], "patch", "must be 'scalar' or 'channel', got 'patch'"),
    ],
)
def test_statistics_that_cannot_normalise_are_refused(batches, kind, message):
    with pytest.raises(ValueError, match=message):
        measure(batches).result(kind)


def test_one_constant_channel_is_refused_per_channel():
    batch = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    batch[..., 1] = 2.0
    assert measure([batch]).result("scalar")[1] > 0
    with pytest.raises(ValueError, match="do not vary"):
        measure([batch]).result("channel")


def test_broken_latents_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        measure([torch.full((1, 4, 3), float("inf")), torch.zeros(1, 4, 3)]).result("channel")
    with pytest.raises(ValueError, match=r"must have 3 channels, got shape \(1, 4, 2\)"):
        measure([torch.zeros(1, 4, 2)])


def tiny_tokenizer(seed, **settings):
    torch.manual_seed(seed)
    return AutoencoderMAE(
        sample_size=8,
        patch_size=4,
        latent_channels=2,
        num_latent_tokens=3,
        hidden_size=8,
        num_layers=1,
        num_attention_heads=1,
        **settings,
    ).eval()


@pytest.mark.parametrize("gaussian_posterior", [False, True])
def test_encoded_latents_are_raw_and_carry_no_gradient(gaussian_posterior):
    tokenizer = tiny_tokenizer(0, gaussian_posterior=gaussian_posterior, latents_mean=5.0, latents_std=3.0)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = encode_tokens(tokenizer, images)
    encoded = tokenizer.encode(images)
    expected = encoded.latent_dist.mode() if gaussian_posterior else encoded.latent
    assert latents.shape == (2, 3, 2)
    assert not latents.requires_grad
    assert torch.equal(latents, expected)


def gather_twice(state):
    """As of two processes with the same images."""
    return torch.cat([state, state])


def test_tokenizers_are_measured_on_the_same_images():
    tokenizers = {"one": tiny_tokenizer(0), "other": tiny_tokenizer(1)}
    batches = [torch.rand(3, 3, 8, 8) * 2 - 1 for _ in range(2)]
    configs = measure_latents(tokenizers, iter(batches), "scalar", gather_twice)
    assert configs.keys() == tokenizers.keys()
    for name, tokenizer in tokenizers.items():
        latents = torch.cat([encode_tokens(tokenizer, batch) for batch in batches]).double()
        assert configs[name]["latents_mean"] == pytest.approx(latents.mean().item())
        assert configs[name]["latents_std"] == pytest.approx(latents.std(correction=0).item())


def test_broken_tokenizer_is_left_out_with_a_warning(caplog):
    tokenizers = {"good": tiny_tokenizer(0), "broken": tiny_tokenizer(1)}
    with torch.no_grad():
        tokenizers["broken"].encoder.proj_out.weight.fill_(torch.nan)
    configs = measure_latents(tokenizers, [torch.zeros(1, 3, 8, 8)], "scalar", gather_twice)
    assert configs.keys() == {"good"}
    assert "of broken are left out: The latents are not finite" in caplog.text


def states(*sets):
    for latents in sets:
        statistics = LatentStatistics(latents.shape[-1])
        statistics.update(latents)
        yield statistics.state().tolist()


def test_statistics_of_shards_are_those_of_all_values():
    latents = seeded_normal(10, 3, 2) * torch.tensor([1.0, 5.0]) + 2
    found = summarize_statistics(states(latents[:1], latents[1:7], latents[7:]))
    values = latents.double()
    assert found["scalar"]["latents_mean"] == pytest.approx(values.mean().item())
    assert found["scalar"]["latents_std"] == pytest.approx(values.std(correction=0).item())
    assert found["channel"]["latents_mean"] == pytest.approx(values.mean((0, 1)).tolist())
    assert found["channel"]["latents_std"] == pytest.approx(values.flatten(0, 1).std(0, correction=0).tolist())


def test_a_channel_that_does_not_vary_costs_the_statistics_of_channels_only(caplog):
    latents = seeded_normal(4, 3, 2) * torch.tensor([1.0, 0.0])
    assert set(summarize_statistics(states(latents))) == {"scalar"}
    assert "Some channels" in caplog.text
    with pytest.raises(ValueError, match="do not vary"):
        summarize_statistics(states(torch.zeros(4, 3, 2)))
