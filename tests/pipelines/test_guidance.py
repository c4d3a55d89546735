"""Which guidance a call means, how many passes it takes, and the component that autoguidance needs."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler

from maetok_hf import MAETokDiffusionPipeline
from maetok_hf.models import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.pipelines.guidance import combine_velocities
from tests.pipelines.helpers import NULL_CLASS, Passes, generator, tiny_pipeline
from tests.testing_utils import (
    TRANSFORMER_CONFIG,
    randomize_parameters,
    seeded_normal,
    tiny_autoencoder,
    tiny_transformer,
)


GRID = [1, 0.75, 0.5, 0.25]
EVERYWHERE = (0.0, 1.0)
LABELS = [3, 5]
MODELS = {
    "sit": SiTTransformer1DModel,
    "lightning_dit": LightningDiTTransformer1DModel,
    "usit": USiTTransformer1DModel,
}
# one pipeline for each method that it chooses by itself
FORMS = {
    "cfg": {},
    "autoguidance": {"guidance_transformer": {}},
    "gft": {"transformer": {"temperature_embedding": True}},
}


def form(method: str, **kwargs) -> MAETokDiffusionPipeline:
    return tiny_pipeline(**FORMS[method], **kwargs)


def sample(pipe: MAETokDiffusionPipeline, **kwargs) -> torch.Tensor:
    settings = {"class_labels": LABELS, "num_inference_steps": 4, "latents": seeded_normal(2, 6, 4)} | kwargs
    return pipe(**settings, output_type="latent").images


def run(pipe: MAETokDiffusionPipeline) -> np.ndarray:
    return pipe(LABELS, num_inference_steps=4, generator=generator(), output_type="np").images


# The choice of the method


@pytest.mark.parametrize("method", FORMS)
def test_the_components_choose_the_method_and_the_published_scale(method):
    pipe = form(method)
    by_default = sample(pipe)
    assert pipe.guidance_method == method and pipe.guidance_scale == 1.9
    assert torch.equal(by_default, sample(pipe, guidance_method=method, guidance_scale=1.9))


def test_a_model_that_needs_no_second_pass_is_preferred_and_every_other_method_can_be_named():
    pipe = tiny_pipeline(**FORMS["gft"], **FORMS["autoguidance"])
    samples = {method: sample(pipe, guidance_method=method) for method in (None, "gft", "autoguidance", "cfg")}
    assert torch.equal(samples[None], samples["gft"])
    assert len({tuple(s.flatten().tolist()) for s in samples.values()}) == 3


def test_naming_cfg_declines_autoguidance():
    with_weak, without = form("autoguidance"), form("cfg")
    passes = Passes(with_weak, "guidance_transformer")
    assert torch.equal(sample(with_weak, guidance_method="cfg"), sample(without))
    assert not passes.times


def test_a_temperature_is_the_inverse_of_a_scale():
    pipe = form("gft")
    by_temperature = sample(pipe, guidance_temperature=0.5)
    assert pipe.guidance_scale == 2
    assert torch.equal(by_temperature, sample(pipe, guidance_scale=2.0))


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("cfg", {"guidance_method": "apg"}, r"`guidance_method` must be one of \('cfg', .*got 'apg'"),
        ("cfg", {"guidance_method": "autoguidance"}, "needs the component `guidance_transformer`"),
        ("gft", {"guidance_method": "autoguidance"}, "needs the component `guidance_transformer`"),
        ("cfg", {"guidance_method": "gft"}, "`guidance_method='gft'` needs a `transformer` trained for it"),
        ("cfg", {"guidance_temperature": 0.5}, "`guidance_temperature=0.5` needs a `transformer` trained for it"),
        ("autoguidance", {"guidance_temperature": 0.5}, "`guidance_temperature=0.5` needs a `transformer`"),
        ("gft", {"guidance_method": "cfg", "guidance_temperature": 0.5}, "belongs to `guidance_method='gft'`"),
        ("gft", {"guidance_scale": 2.0, "guidance_temperature": 0.5}, "either `guidance_scale` or .* 2.0 and 0.5"),
        ("gft", {"guidance_scale": 0.9}, "`guidance_scale` must be at least 1 .* got 0.9"),
        ("gft", {"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number"),
        ("gft", {"guidance_temperature": 0.0}, r"`guidance_temperature` must lie in \(0, 1\] .* got 0.0"),
        ("gft", {"guidance_temperature": 1.1}, "`guidance_temperature` must lie in"),
        ("gft", {"guidance_temperature": float("nan")}, "`guidance_temperature` must lie in"),
        ("gft", {"guidance_temperature": True}, "`guidance_temperature` must lie in"),
        ("gft", {"guidance_temperature": "0.5"}, "`guidance_temperature` must lie in"),
        ("autoguidance", {"guidance_scale": -1}, "`guidance_scale` must be a finite number of at least 0"),
    ],
    ids=str,
)
def test_what_the_components_cannot_do_is_refused_before_any_computation(method, kwargs, message):
    pipe, rng = form(method), generator()
    passes, state = Passes(pipe), rng.get_state()
    with pytest.raises(ValueError, match=message):
        pipe(3, num_inference_steps=2, generator=rng, **kwargs)
    assert not passes.times and torch.equal(rng.get_state(), state)


# Passes


@pytest.mark.parametrize(
    ("interval", "inside"), [(EVERYWHERE, GRID), ((0.0, 0.75), GRID[1:]), ((0.5, 0.5), [0.5]), ((0.3, 0.45), [])]
)
def test_passes_of_each_method(interval, inside):
    """One outside the interval; inside it two of one batch each, or one that knows its temperature."""
    outside = [t for t in GRID if t not in inside]

    pipe = form("cfg")
    passes = Passes(pipe)
    sample(pipe, guidance_interval=interval)
    assert sorted(passes.times) == sorted(outside + 2 * inside) and passes.guided_times == inside
    assert passes.labels.count(LABELS) == 4 and passes.labels.count([NULL_CLASS] * 2) == len(inside)

    pipe = form("autoguidance")
    strong, weak = Passes(pipe), Passes(pipe, "guidance_transformer")
    sample(pipe, guidance_interval=interval)
    assert strong.times == GRID and weak.times == inside
    assert strong.labels == 4 * [LABELS] and weak.labels == len(inside) * [LABELS]

    pipe = form("gft")
    passes = Passes(pipe)
    sample(pipe, guidance_interval=interval, guidance_scale=2.0)
    assert passes.times == GRID and passes.labels == 4 * [LABELS]
    assert passes.temperatures == [0.5 if t in inside else 1.0 for t in GRID]


@pytest.mark.parametrize("method", FORMS)
def test_scale_one_is_one_pass_without_guidance(method):
    pipe = form(method)
    passes = Passes(pipe)
    sample(pipe, guidance_scale=1.0, guidance_interval=EVERYWHERE)
    assert passes.times == GRID and set(passes.temperatures) == {1.0 if method == "gft" else None}


def test_both_models_of_autoguidance_see_the_same_latents():
    pipe = form("autoguidance")
    strong, weak = Passes(pipe), Passes(pipe, "guidance_transformer")
    sample(pipe, guidance_interval=EVERYWHERE)
    assert all(map(torch.equal, strong.inputs, weak.inputs))


def test_heuns_corrector_is_autoguided_if_its_step_started_inside():
    pipe = form("autoguidance", scheduler="heun")
    weak = Passes(pipe, "guidance_transformer")
    sample(pipe, guidance_interval=(0.6, 0.8))
    np.testing.assert_allclose(weak.times, [0.75, 0.5])


def test_without_labels_only_autoguidance_has_two_passes_both_of_the_null_class():
    latents = seeded_normal(1, 6, 4)
    null = [[NULL_CLASS]]
    for method in FORMS:
        pipe = form(method)
        passes = Passes(pipe)
        sample(pipe, class_labels=None, latents=latents, guidance_interval=EVERYWHERE)
        assert passes.labels == 4 * null and set(passes.temperatures) == {1.0 if method == "gft" else None}
    pipe = form("autoguidance")
    weak = Passes(pipe, "guidance_transformer")
    sample(pipe, class_labels=None, latents=latents, guidance_interval=EVERYWHERE)
    assert weak.labels == 4 * null


@pytest.mark.parametrize(
    ("method", "asked"),
    [("cfg", {"guidance_scale": 3.0}), ("gft", {"guidance_scale": 3.0}), ("gft", {"guidance_temperature": 0.5})],
)
def test_guidance_that_is_asked_for_without_a_class_is_refused(method, asked):
    (name, value), pipe = *asked.items(), form(method)
    with pytest.raises(ValueError, match=f"`{name}` is {value}, but `class_labels=None` .* '{method}' strengthens"):
        sample(pipe, class_labels=None, latents=seeded_normal(1, 6, 4), **asked)
    noise = {"class_labels": None, "latents": seeded_normal(1, 6, 4)}
    assert torch.equal(sample(pipe, **noise, **{name: 1.0}), sample(pipe, **noise))
    sample(form("autoguidance"), **noise, guidance_scale=3.0)


def test_a_model_with_temperatures_can_still_be_guided_by_its_null_class():
    pipe = form("gft")
    passes = Passes(pipe)
    sample(pipe, guidance_method="cfg", guidance_interval=EVERYWHERE)
    assert len(passes.times) == 8 and set(passes.temperatures) == {1.0}


def test_a_weak_model_with_temperatures_is_asked_at_temperature_one():
    pipe = tiny_pipeline(guidance_transformer={"temperature_embedding": True})
    weak = Passes(pipe, "guidance_transformer")
    sample(pipe, guidance_interval=EVERYWHERE)
    assert weak.temperatures == 4 * [1.0]


def test_a_callback_may_change_scale_and_temperature():
    pipe = form("gft")
    passes = Passes(pipe)

    def double(pipe, step, timestep, tensors):
        pipe._guidance_scale *= 2
        return tensors

    sample(pipe, guidance_scale=1.0, guidance_interval=EVERYWHERE, callback_on_step_end=double)
    assert passes.temperatures == [1.0, 0.5, 0.25, 0.125]


# Velocities


def test_combination_extrapolates_through_the_better_velocity():
    base, velocity = torch.tensor([1.0, -2.0]), torch.tensor([3.0, -1.0])
    assert combine_velocities(base, velocity, 2.5).tolist() == [6.0, 0.5]
    assert torch.equal(combine_velocities(base, velocity, 0.0), base)


def test_autoguidance_combines_the_velocities_of_two_models():
    pipe = form("autoguidance")
    noise = seeded_normal(2, 6, 4)
    with torch.no_grad():
        inputs = noise, torch.ones(2), torch.tensor(LABELS)
        strong, weak = pipe.transformer(*inputs).sample, pipe.guidance_transformer(*inputs).sample
    one_step = {"num_inference_steps": 1, "guidance_interval": EVERYWHERE}
    torch.testing.assert_close(sample(pipe, **one_step, guidance_scale=2.5), noise - (weak + 2.5 * (strong - weak)))
    torch.testing.assert_close(sample(pipe, **one_step, guidance_scale=0.0), noise - weak)


def test_a_model_that_guides_itself_changes_nothing():
    pipe = form("cfg")
    plain = sample(pipe, guidance_scale=1.0)
    pipe.guidance_transformer = pipe.transformer
    torch.testing.assert_close(sample(pipe, guidance_scale=5.0, guidance_interval=EVERYWHERE), plain)


def test_the_two_models_may_have_different_dtypes():
    pipe = form("autoguidance")
    exact = sample(pipe)
    pipe.guidance_transformer.to(torch.bfloat16)
    mixed = sample(pipe)
    assert mixed.dtype == torch.float32 and 0 < (mixed - exact).abs().max() < 0.1


# The component


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("sample_size", 8, "8, but the transformer's is 6"),
        ("in_channels", 5, "5, but the transformer's is 4"),
        ("num_classes", 9, "9, but the transformer's is 10"),
        ("path", "cosine", "'cosine', but the transformer's is 'linear'"),
    ],
)
def test_a_guidance_transformer_that_does_not_fit_is_named(name, value, shown):
    pipe = tiny_pipeline(guidance_transformer={name: value})
    passes = Passes(pipe)
    with pytest.raises(ValueError, match=f"the guidance_transformer's `{name}` is {shown}"):
        pipe(1, num_inference_steps=1)
    assert not passes.times


def test_it_is_saved_and_loaded_with_the_pipeline(tmp_path):
    pipe = form("autoguidance", scheduler="sde")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["guidance_transformer"] == ["maetok_hf", "SiTTransformer1DModel"]
    for loader in (MAETokDiffusionPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.guidance_transformer.config.num_layers == 1 and not loaded.guidance_transformer.training
        np.testing.assert_array_equal(run(loaded), run(pipe))
    declined = MAETokDiffusionPipeline.from_pretrained(tmp_path, guidance_transformer=None)
    assert declined.guidance_transformer is None


def test_it_is_never_required(tmp_path):
    pipe = form("cfg")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["guidance_transformer"] == [None, None]
    # and an index that was written without any such entry
    for entry in (index, {key: value for key, value in index.items() if key != "guidance_transformer"}):
        (tmp_path / "model_index.json").write_text(json.dumps(entry))
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.guidance_transformer is None
        np.testing.assert_array_equal(run(loaded), run(pipe))


def test_it_can_be_added_when_loading_and_by_assignment(tmp_path):
    form("cfg").save_pretrained(tmp_path)
    weak = tiny_transformer(1, num_layers=1)
    expected = sample(form("autoguidance"))
    loaded = MAETokDiffusionPipeline.from_pretrained(tmp_path, guidance_transformer=weak)
    assigned = form("cfg")
    assigned.guidance_transformer = weak
    for pipe in (loaded, assigned):
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(sample(pipe), expected)
    # an assigned component is saved like one that was given from the start
    assigned.save_pretrained(tmp_path / "assigned")
    reloaded = MAETokDiffusionPipeline.from_pretrained(tmp_path / "assigned")
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample(reloaded), expected)


def tiny_model(name: str, seed: int = 0, **config) -> torch.nn.Module:
    return randomize_parameters(MODELS[name](**TRANSFORMER_CONFIG | {"num_layers": 3} | config), seed).eval()


@pytest.mark.parametrize("weak", MODELS)
@pytest.mark.parametrize("strong", MODELS)
def test_every_model_is_guided_in_every_way_and_by_every_other(strong, weak, tmp_path):
    pipe = MAETokDiffusionPipeline(
        tiny_autoencoder(),
        tiny_model(strong, temperature_embedding=True),
        FlowMatchEulerDiscreteScheduler(),
        guidance_transformer=tiny_model(weak, seed=1),
    )
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    other = MAETokDiffusionPipeline.from_pipe(pipe)
    for each in (pipe, loaded, other):
        each.set_progress_bar_config(disable=True)
    passes = {"cfg": 8, "autoguidance": 8, "gft": 4}
    counters = [Passes(pipe), Passes(pipe, "guidance_transformer")]
    for method, expected in passes.items():
        before = sum(len(counter.times) for counter in counters)
        latents = sample(pipe, guidance_method=method, guidance_interval=EVERYWHERE)
        assert sum(len(counter.times) for counter in counters) - before == expected
        for each in (loaded, other):
            assert torch.equal(sample(each, guidance_method=method, guidance_interval=EVERYWHERE), latents)


def test_it_follows_casts_and_goes_along_into_other_pipelines():
    pipe = form("autoguidance")
    other = MAETokDiffusionPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler())
    assert other.guidance_transformer is pipe.guidance_transformer
    assert pipe.to(torch.float16).guidance_transformer.dtype == torch.float16


def test_in_training_mode_it_samples_without_dropout_and_stays_in_it():
    expected = sample(form("autoguidance"))
    pipe = tiny_pipeline(guidance_transformer={"class_dropout_prob": 0.9})
    pipe.guidance_transformer.train()
    assert torch.equal(sample(pipe), expected)
    assert pipe.guidance_transformer.training


def recording(events: list, event: tuple[str, str], function):
    """The same function, which notes that it was called."""

    def record(*args, **kwargs):
        events.append(event)
        return function(*args, **kwargs)

    return record


@pytest.mark.parametrize("interval", [EVERYWHERE, (0.5, 0.75)], ids=str)
def test_model_offload_keeps_both_transformers_until_the_decoder_needs_room(interval, monkeypatch):
    pipe = form("autoguidance")
    settings = {"num_inference_steps": 4, "guidance_interval": interval, "output_type": "np"}
    expected = pipe(LABELS, generator=generator(), **settings).images
    pipe.enable_model_cpu_offload(device="cpu")
    events = []
    for name in ("transformer", "guidance_transformer", "vae"):
        hook = getattr(pipe, name)._hf_hook
        for event in ("pre_forward", "init_hook"):
            monkeypatch.setattr(hook, event, recording(events, (name, event), getattr(hook, event)))
    np.testing.assert_array_equal(pipe(LABELS, generator=generator(), **settings).images, expected)
    # `init_hook` moves a model away: none leaves before both are done, and then at once
    away = events.index(("guidance_transformer", "init_hook"))
    assert events[away + 1 :] == [("vae", "pre_forward")]
    assert {name for name, _ in events[:away]} == {"transformer", "guidance_transformer"}
    assert {event for _, event in events[:away]} == {"pre_forward"}
    # and the hooks are there again for the next run
    np.testing.assert_array_equal(pipe(LABELS, generator=generator(), **settings).images, expected)


@pytest.mark.parametrize("settings", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(settings):
    pipe = form("autoguidance")
    expected = run(pipe)
    if settings["offload_type"] == "block_level":
        settings = settings | {"num_blocks_per_group": 1}
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **settings)
    np.testing.assert_allclose(run(pipe), expected, atol=1e-6)


def test_caches_of_the_two_models_are_apart():
    pipe = tiny_pipeline(transformer={"num_layers": 3}, guidance_transformer={"sample_size": 6})
    pipe.guidance_transformer = tiny_transformer(1, num_layers=3)
    settings = {"num_inference_steps": 6, "guidance_interval": EVERYWHERE, "guidance_scale": 3.0}
    exact = sample(pipe, **settings)
    models, evaluated = (pipe.transformer, pipe.guidance_transformer), []
    for model in models:
        model.transformer_blocks[-1].ff.register_forward_hook(lambda *args: evaluated.append(1))
    # the threshold decides: nothing is ever reused, or everything after each model's first pass
    for threshold, expected in ((0.0, 12), (1e9, 2)):
        evaluated.clear()
        for model in models:
            model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        cached = sample(pipe, **settings)
        assert len(evaluated) == expected
        assert ((cached - exact).abs().max() < 1e-5) == (threshold == 0)
        assert torch.equal(sample(pipe, **settings), cached)  # nothing leaks into the next run
        for model in models:
            model.disable_cache()


def test_a_null_class_that_was_never_trained_is_not_asked():
    pipe = tiny_pipeline("sde")
    pipe.transformer.register_to_config(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="`guidance_scale` = 1.9 is classifier-free guidance, but the `transformer`"):
        pipe([0], num_inference_steps=2)
    with pytest.raises(ValueError, match="`class_labels=None` samples from the null class"):
        pipe(None, guidance_scale=1.0, num_inference_steps=2)
    assert pipe([0], guidance_scale=1.0, num_inference_steps=2, output_type="np").images.shape[0] == 1
