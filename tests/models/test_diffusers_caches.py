"""diffusers' inference caches on the generator: each skips work on the second step, and only there."""

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)

from maetok_hf.models.layers import MAETokAttention
from tests.models.cases import TRANSFORMER_CASES
from tests.testing_utils import tiny_autoencoder


NUM_LAYERS = 5  # odd, as U-ViT wants it
CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=1e9),
    "mag": lambda: MagCacheConfig(num_inference_steps=2, retention_ratio=0.0, threshold=100.0, mag_ratios=[1.0, 1.0]),
    "taylorseer": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1),
    "pyramid_attention": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.fixture(params=CACHES.values(), ids=CACHES.keys())
def config(request):
    return request.param()


@pytest.fixture(params=TRANSFORMER_CASES.values(), ids=TRANSFORMER_CASES.keys())
def case(request):
    return request.param


def count_attention_calls(model):
    counts = [0]

    def count(module, args, kwargs):
        counts[0] += 1

    for module in model.modules():
        if isinstance(module, MAETokAttention):
            module.to_q.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def step(case, model, shift=0.0, context="cond"):
    inputs = case.inputs()
    inputs["hidden_states"] = inputs["hidden_states"] + shift
    with torch.no_grad(), model.cache_context(context):
        return model(**inputs).sample


def test_the_second_step_reuses_the_first(case, config):
    model = case.build(num_layers=NUM_LAYERS)
    expected, expected_shifted = step(case, model), step(case, model, 0.3)
    counts = count_attention_calls(model)
    model.enable_cache(config)
    assert torch.allclose(step(case, model), expected, atol=1e-5)
    assert counts[0] == NUM_LAYERS
    reused = step(case, model, 0.3)
    assert NUM_LAYERS <= counts[0] < 2 * NUM_LAYERS, "the second step must skip attention layers"
    assert reused.isfinite().all() and not torch.allclose(reused, expected_shifted, atol=1e-5)

    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.equal(step(case, model, 0.3), expected_shifted)


def test_a_reset_forgets_the_first_step(case, config):
    model = case.build(num_layers=NUM_LAYERS)
    expected, expected_shifted = step(case, model), step(case, model, 0.3)
    model.enable_cache(config)
    torch.testing.assert_close(step(case, model), expected, atol=1e-5, rtol=1e-5)
    model._reset_stateful_cache()
    torch.testing.assert_close(step(case, model, 0.3), expected_shifted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["first_block", "mag", "taylorseer"])
def test_contexts_do_not_mix(case, name):
    model = case.build(num_layers=NUM_LAYERS)
    expected, expected_shifted = step(case, model), step(case, model, 0.3, context="uncond")
    model.enable_cache(CACHES[name]())
    torch.testing.assert_close(step(case, model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step(case, model, 0.3, context="uncond"), expected_shifted, atol=1e-5, rtol=1e-5)


def test_caching_twice_is_refused(case, config):
    model = case.build()
    model.enable_cache(config)
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(config)


def test_faster_cache_runs(case):
    timestep = [1000]
    model = case.build(num_layers=NUM_LAYERS)
    model.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            tensor_format="BCHW",
            # the other form splits image frequencies, which a token sequence does not have
            is_guidance_distilled=True,
            current_timestep_callback=lambda: timestep[0],
        )
    )
    inputs = case.inputs()
    with torch.no_grad():
        model(**inputs)
        timestep[0] = 500
        inputs["hidden_states"] = inputs["hidden_states"] + 0.3
        cached = model(**inputs).sample
        model.disable_cache()
        assert cached.isfinite().all() and not torch.allclose(model(**inputs).sample, cached, atol=1e-5)


SKIPS = {
    "block": {"skip_attention": True, "skip_ff": True},
    "attention": {"skip_attention": True, "skip_ff": False},
    "mlp": {"skip_attention": False, "skip_ff": True},
    "scores": {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
}


@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS.keys())
def test_layer_skipping_reaches_blocks_attention_and_mlp(case, skip):
    model = case.build(num_layers=NUM_LAYERS)
    expected = case.run(model)
    apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="transformer_blocks", dropout=1.0, **skip))
    output = case.run(model)
    assert output.isfinite().all() and not torch.allclose(output, expected, atol=1e-5)


def test_tokenizers_have_no_inference_cache():
    assert not hasattr(type(tiny_autoencoder()), "enable_cache")
