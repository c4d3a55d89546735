"""The page gives the images that a call of the pipeline gives, and shows the way to them."""

import threading

import numpy as np
import pytest
import torch

from maetok_hf import FlowMatchEulerMaruyamaScheduler
from maetok_hf.page.abilities import NO_CLASS, LoadedPipeline, solver_for
from maetok_hf.page.generation import (
    MAX_SEED,
    GenerationSettings,
    decode_latents,
    predicted_data,
    python_code,
    sample,
    watch,
)
from maetok_hf.schedulers.paths import path_coefficients
from tests.pipelines.helpers import Passes, generators, tiny_pipeline
from tests.testing_utils import seeded_normal


GUIDED = {"scheme": "cfg", "scale": 2.0, "interval": (0.1, 0.8)}


def settings(**values):
    return GenerationSettings(**({"class_index": 3, "seed": 5, "num_images": 2, "num_inference_steps": 6} | values))


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


# The same images


@pytest.mark.parametrize(
    ("scheduler", "values", "arguments"),
    [
        ("sde", {}, {"guidance_scale": 1.0}),
        (
            "euler",
            GUIDED,
            {"guidance_method": "cfg", "guidance_scale": 2.0, "guidance_interval": (0.1, 0.8)},
        ),
        ("euler", {"solver": "heun", "scheme": "cfg", "scale": 1.0}, {"guidance_scale": 1.0}),
        ("sde", {"class_index": NO_CLASS}, {"guidance_scale": 1.0}),
    ],
    ids=["stochastic", "guided", "another solver", "no class"],
)
def test_images_are_those_of_a_call_with_the_same_seeds(scheduler, values, arguments):
    pipe = tiny_pipeline(scheduler)
    before = dict(pipe.scheduler.config)
    asked = settings(**values)
    *_, last = watch(pipe, asked)
    found = arrays(sample(pipe, asked))
    assert dict(pipe.scheduler.config) == before and pipe.scheduler.step_index is None

    if "solver" in values:
        pipe.scheduler = solver_for(pipe, values["solver"])
    if asked.class_index == NO_CLASS:
        arguments = {"class_labels": None, "num_images_per_label": 2, **arguments}
    else:
        arguments = {"class_labels": [3, 3], **arguments}
    expected = arrays(pipe(**arguments, num_inference_steps=6, generator=generators(5, 6)).images)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(arrays(last.images), expected)
    assert expected.std() > 5 and (expected[0] != expected[1]).any()


def test_an_image_has_its_own_seed_whatever_else_is_asked_for():
    pipe = tiny_pipeline("sde")
    together = arrays(sample(pipe, settings(seed=4, num_images=3)))
    alone = arrays(sample(pipe, settings(seed=6, num_images=1)))
    assert abs(together[2].astype(int) - alone[0]).max() <= 1


@pytest.mark.parametrize("scheduler", ["sde", "unipc"])
def test_the_program_makes_the_same_images(scheduler, tmp_path):
    pipe = tiny_pipeline("sde")
    pipe.save_pretrained(tmp_path)
    solver = "own" if scheduler == "sde" else "unipc"
    for values in ({**GUIDED, "solver": solver}, {"class_index": NO_CLASS, "solver": solver}):
        asked, names = settings(**values), {}
        exec(python_code(LoadedPipeline(pipe=pipe, name=str(tmp_path)), asked), names)
        np.testing.assert_array_equal(arrays(names["images"]), arrays(sample(pipe, asked)))


def test_the_program_names_revision_and_type():
    pipe = tiny_pipeline().to(torch.bfloat16)
    program = python_code(LoadedPipeline(pipe=pipe, name="user/name", revision="v2"), settings())
    assert "from_pretrained('user/name', revision='v2', dtype=torch.bfloat16)\n" in program


# The way


def test_moments_are_spread_over_the_run_and_the_end_is_the_last():
    moments = list(watch(tiny_pipeline(), settings(num_inference_steps=20), num_previews=4))
    assert [moment.step for moment in moments] == [4, 8, 12, 16, 20]
    assert [moment.is_final for moment in moments] == [False] * 4 + [True]
    assert all(moment.num_steps == 20 and len(moment.images) == 2 for moment in moments)
    times = [moment.time for moment in moments]
    assert times == sorted(times, reverse=True) and times[-1] == 0
    # more previews than steps: one after each, but for the last
    assert [m.step for m in watch(tiny_pipeline(), settings(num_inference_steps=3), num_previews=10)] == [1, 2, 3]


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_right_velocity_predicts_the_data(path):
    data, noise = seeded_normal(2, 6, 4, seed=1), seeded_normal(2, 6, 4, seed=2)
    for time in (1.0, 0.6, 0.01):
        a, s, a_slope, s_slope = path_coefficients(torch.tensor(time), path)
        found = predicted_data(a * data + s * noise, a_slope * data + s_slope * noise, time, path)
        torch.testing.assert_close(found, data, atol=1e-5, rtol=1e-5)


def test_what_is_shown_is_the_predicted_clean_image():
    pipe = tiny_pipeline("euler")
    noise = torch.cat([torch.randn(1, 6, 4, generator=one) for one in generators(5, 6)])
    labels = torch.tensor([3, 3])
    with torch.no_grad():
        velocity = pipe.transformer(noise, torch.ones(2), labels).sample
    first = next(iter(watch(pipe, settings(num_inference_steps=4), num_previews=4)))
    assert first.step == 1 and first.time == 1
    np.testing.assert_array_equal(arrays(first.images), arrays(decode_latents(pipe, noise - velocity)))


def test_a_cosine_path_is_shown_too():
    scheduler = FlowMatchEulerMaruyamaScheduler(path="cosine")
    pipe = tiny_pipeline(scheduler, transformer={"path": "cosine"})
    *_, last = watch(pipe, settings())
    assert last.is_final


def test_closing_the_iterator_stops_the_run():
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    moments = watch(pipe, settings(num_inference_steps=500), num_previews=100)
    next(moments)
    run = next(thread for thread in threading.enumerate() if thread.name == "page run")
    moments.close()
    run.join(timeout=60)
    assert not run.is_alive() and len(passes.times) < 490


@pytest.mark.parametrize("before", [True, False], ids=["before the first step", "on the way"])
def test_a_run_that_is_told_to_stop_ends_without_images(before):
    pipe, stop = tiny_pipeline(), threading.Event()
    passes, moments = Passes(pipe), []
    if before:
        stop.set()
    for moment in watch(pipe, settings(num_inference_steps=500), num_previews=100, stop=stop):
        moments.append(moment)
        stop.set()
    assert len(passes.times) == 1 if before else len(passes.times) < 490
    assert len(moments) <= 90 and not any(moment.is_final for moment in moments)


def test_an_error_inside_a_run_reaches_the_page(monkeypatch):
    pipe = tiny_pipeline()

    def fail(*args, **kwargs):
        raise FloatingPointError("not finite")

    monkeypatch.setattr(pipe.transformer, "forward", fail)
    with pytest.raises(FloatingPointError, match="not finite"):
        list(watch(pipe, settings()))


def test_two_runs_at_once_do_not_disturb_each_other():
    pipe = tiny_pipeline("unipc")
    asked = [settings(num_inference_steps=12), settings(class_index=7, seed=40, num_inference_steps=9)]
    alone = [arrays(sample(pipe, one)) for one in asked]
    runs = [watch(pipe, one) for one in asked]
    last = [None, None]
    while runs[0] is not None or runs[1] is not None:
        for i, run in enumerate(runs):
            moment = next(run, None) if run is not None else None
            if moment is None:
                runs[i] = None
            else:
                last[i] = moment.images
    for images, expected in zip(last, alone, strict=True):
        np.testing.assert_array_equal(arrays(images), expected)


def test_steps_are_reported():
    calls = []
    sample(tiny_pipeline("heun"), settings(num_inference_steps=3), lambda done, total: calls.append((done, total)))
    assert calls == [(done, 5) for done in range(1, 6)]


# What cannot be asked for


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_images": 17}, "The number of images must be a whole number from 1 to 16, got 17"),
        ({"num_images": True}, "The number of images"),
        ({"num_inference_steps": 0}, "The number of steps must be a whole number from 1 to 1000, got 0"),
        ({"seed": -1}, "The seed must be a whole number from 0 to 4294967295, got -1"),
        ({"seed": 0.5}, "The seed must be a whole number"),
        ({"seed": MAX_SEED, "num_images": 2}, "The seed of the last image would be above"),
        ({"scale": float("nan")}, "The scale must be a number from 0 to 20, got nan"),
        ({"scheme": "magic"}, "The guidance must be one of none, cfg, autoguidance, gft, got 'magic'"),
        (GUIDED | {"interval": (0.8, 0.1)}, "move the lower end below the upper one"),
        (GUIDED | {"interval": (-0.1, 0.5)}, "times in"),
        (GUIDED | {"class_index": NO_CLASS}, "strengthens a class, and there is none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        settings(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"class_index": 10}, "no class 10"),
        ({"scheme": "gft", "scale": 2.0}, "no guidance 'gft'"),
        ({"solver": "ddim"}, "no solver 'ddim'"),
    ],
)
def test_what_a_pipeline_lacks_is_refused_before_any_computation(values, message):
    pipe = tiny_pipeline()
    passes = Passes(pipe)
    with pytest.raises(ValueError, match=message):
        sample(pipe, settings(**values))
    with pytest.raises(ValueError, match=message):
        next(watch(pipe, settings(**values)))
    assert not passes.times


def test_autoguidance_works_without_a_class():
    pipe = tiny_pipeline(guidance_transformer={})
    asked = settings(class_index=NO_CLASS, scheme="autoguidance", scale=2.0)
    expected = pipe(None, 2.0, (0.0, 1.0), 6, 2, generators(5, 6), guidance_method="autoguidance").images
    np.testing.assert_array_equal(arrays(sample(pipe, asked)), arrays(expected))
