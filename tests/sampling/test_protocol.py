"""The protocol beside a set: complete, compared before the set is continued, and nothing in it without effect."""

import dataclasses
import json
import logging
import shutil

import pytest
import torch

from maetok_hf.sampling import (
    GenerateOptions,
    check_free_space,
    make_scheduler,
    record_settings,
    resolve_sampling,
    run_settings,
    sampling_settings,
)
from maetok_hf.sampling.options import FORMATS
from maetok_hf.training.configuration import field_help
from tests.pipelines.helpers import tiny_pipeline


TEMPERATURE = {"temperature_embedding": True}


def options(**values):
    given = {"pretrained_model_name_or_path": "x", "output_dir": "y", "num_images": 12, "num_inference_steps": 3}
    return GenerateOptions(**given | values)


def settings(pipe, classes=(0, 1, 2), **values):
    asked = options(**values)
    return sampling_settings(asked, pipe, classes, resolve_sampling(asked, pipe, classes))


def test_every_option_is_described():
    assert len(field_help(GenerateOptions)) == len(dataclasses.fields(GenerateOptions))


@pytest.mark.parametrize("name", ["num_images", "batch_size", "num_inference_steps"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        options(**{name: 0})


@pytest.mark.parametrize("value", [[], ["jpg"], ["png", "png"]])
def test_format_must_name_one_or_both(value):
    with pytest.raises(ValueError, match=f"one or both of {', '.join(FORMATS)}"):
        options(format=value)


@pytest.mark.parametrize("name", ["euler-maruyama", "euler", "heun", "unipc", "dpm-solver++"])
def test_every_scheduler_samples_with_the_time_shift_of_the_pipelines_own(name):
    pipe = tiny_pipeline()
    pipe.scheduler = type(pipe.scheduler)(shift=2.5)
    pipe.scheduler = make_scheduler(name, pipe)
    config = settings(pipe)["scheduler"]
    assert config.get("shift", config.get("flow_shift")) == 2.5
    # and again, since a solver may be replaced by another
    assert make_scheduler("euler", pipe).config.shift == 2.5
    pipe(0, num_inference_steps=3, output_type="latent")


def test_unknown_scheduler_is_refused():
    with pytest.raises(ValueError, match="`scheduler` must be .*, got 'rk4'"):
        make_scheduler("rk4", tiny_pipeline())


def test_settings_say_how_the_set_was_sampled_and_survive_json():
    recorded = settings(tiny_pipeline("sde"), range(10), guidance_scale=1.5, seed=4)
    assert recorded == json.loads(json.dumps(recorded))
    scheduler = recorded.pop("scheduler")
    assert scheduler["name"] == "FlowMatchEulerMaruyamaScheduler"
    assert scheduler["last_step_size"] == 0.04
    assert set(recorded.pop("digests")) == {"vae", "transformer"}
    assert recorded == {
        "num_images": 12,
        "resolution": [32, 32],
        "num_classes": 10,
        "class_labels": "all",
        "label_draw": "balanced",
        "seed": 4,
        "num_inference_steps": 3,
        "guidance_method": "cfg",
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 0.75],
        "dtype": "float32",
        "rounding": "nearest",
    }


@pytest.mark.parametrize(
    ("parts", "values", "method", "scale"),
    [
        ({}, {}, "cfg", 1.9),
        ({}, {"guidance_scale": 1.0}, "none", 1.0),
        ({"guidance_transformer": {}}, {"guidance_scale": 1.3}, "autoguidance", 1.3),
        ({"transformer": TEMPERATURE}, {"guidance_temperature": 0.5}, "gft", 2.0),
    ],
)
def test_settings_name_the_guidance_that_takes_place_and_the_models_that_it_uses(parts, values, method, scale):
    recorded = settings(tiny_pipeline(**parts), **values)
    assert (recorded["guidance_method"], recorded["guidance_scale"]) == (method, scale)
    assert recorded["class_labels"] == [0, 1, 2]
    assert ("guidance_transformer" in recorded["digests"]) == (method == "autoguidance")
    assert (recorded["guidance_interval"] is None) == (method == "none")


def test_digests_change_with_the_weights():
    pipe = tiny_pipeline()
    before = settings(pipe)["digests"]
    with torch.no_grad():
        pipe.vae.decoder.proj_out.bias[0] += 1e-3
    after = settings(pipe)["digests"]
    assert before["vae"] != after["vae"]
    assert before["transformer"] == after["transformer"]


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ({"guidance_scale": 1.0, "guidance_interval": [0.0, 0.5]}, [0, 1], "has no effect at scale 1"),
        ({"label_draw": "random"}, [3], "`label_draw` = 'random' has no effect with one class"),
        ({"guidance_interval": [0.5, 0.1]}, [0, 1], "`guidance_interval` must be"),
        ({"guidance_interval": [0.5]}, [0, 1], "`guidance_interval` must be"),
        ({"guidance_method": "autoguidance"}, [0, 1], "needs the component `guidance_transformer`"),
        ({"guidance_temperature": 0.5}, [0, 1], "needs a `transformer` trained for it"),
    ],
)
def test_what_has_no_effect_or_cannot_be_done_is_refused(values, classes, message):
    with pytest.raises(ValueError, match=message):
        resolve_sampling(options(**values), tiny_pipeline(), classes)


def test_scheduler_that_does_not_follow_the_models_path_is_refused():
    pipe = tiny_pipeline("euler", transformer={"path": "cosine"})
    with pytest.raises(ValueError, match="trained on the cosine path"):
        resolve_sampling(options(), pipe, [0])
    pipe.scheduler = make_scheduler("euler-maruyama", pipe)
    resolve_sampling(options(), pipe, [0])


def test_set_of_other_settings_is_refused_with_a_list_of_the_differences(tmp_path):
    record_settings(tmp_path, {"seed": 1, "scheduler": {"name": "A", "shift": 1.0}}, {"num_processes": 1})
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(ValueError, match="other settings") as caught:
        record_settings(tmp_path, {"seed": 2, "scheduler": {"name": "A", "shift": 3.0}}, {"num_processes": 1})
    assert "seed: 1 there, 2 now" in str(caught.value)
    assert "scheduler.shift: 1.0 there, 3.0 now" in str(caught.value)
    assert "name" not in str(caught.value)
    assert (tmp_path / "settings.json").read_text() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_set_in_low_precision_is_continued_with_its_batch_size_only(dtype, tmp_path):
    pipe = tiny_pipeline()

    def record(batch_size):
        asked = {"dtype": dtype, "batch_size": batch_size}
        record_settings(tmp_path, settings(pipe, **asked), run_settings(options(**asked), 1, torch.device("cpu")))

    record(8)
    record(8)
    if dtype == "float32":
        record(4)
        return
    with pytest.raises(ValueError, match="batch_size: 8 there, 4 now"):
        record(4)


def test_every_environment_is_recorded_once_and_a_new_one_is_warned_of(tmp_path, caplog):
    one = run_settings(options(), 1, torch.device("cpu"))
    assert {"torch", "diffusers", "maetok_hf"} <= one["versions"].keys()
    many = one | {"num_processes": 8}
    smaller = one | {"batch_size": 4}
    with caplog.at_level(logging.WARNING):
        for run in (one, many, one, many):
            record_settings(tmp_path, {"seed": 1}, run)
        assert not caplog.records
        record_settings(tmp_path, {"seed": 1}, smaller)
    assert "batch_size has another value" in caplog.text
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "settings": {"seed": 1},
        "runs": [one, many, smaller],
    }


def test_disk_must_have_room_for_the_npz_file(tmp_path, monkeypatch, caplog):
    shape = (50_000, 256, 256, 3)  # 9.83 GB

    def free(gigabytes):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(gigabytes * 1e9)))

    free(9.8)
    with pytest.raises(ValueError, match="9.80 GB free, but the .npz file takes 9.83 GB"):
        check_free_space(tmp_path, shape, 0, with_npz=True)
    check_free_space(tmp_path, shape, 50_000, with_npz=False)
    assert not caplog.records
    free(14.0)
    check_free_space(tmp_path, shape, 50_000, with_npz=True)
    assert "PNG files take about 4.92 GB besides the 9.83 GB of the .npz file" in caplog.text
    caplog.clear()
    check_free_space(tmp_path, shape, 10_000, with_npz=True)
    assert not caplog.records
