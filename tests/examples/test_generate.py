"""`generate.py`: exactly the images that were asked for, however they were made, and their protocol beside them."""

import json
import os
import signal
import sys

import numpy as np
import PIL.Image
import pytest
import torch

from tests.pipelines.helpers import tiny_pipeline
from tests.testing_utils import signal_before, start_and_kill


NAMES = {0: "tench", 1: "goldfish"}


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("sde", NAMES).save_pretrained(folder)
    return folder


@pytest.fixture
def flags(pipeline_folder):
    sampling = ["--num_inference_steps", 3, "--guidance_scale", 1.5]
    return ["--pretrained_model_name_or_path", pipeline_folder, "--num_images", 10, "--batch_size", 4, *sampling]


def images_in(folder):
    """Bytes of every image of a set, by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "images").glob("*.png"))}


def pixels_in(folder):
    return np.stack([np.asarray(PIL.Image.open(path)) for path in sorted((folder / "images").glob("*.png"))])


def settings_in(folder):
    return json.loads((folder / "settings.json").read_text())


def recorder(batches, at=None, act=None):
    """A hook on the script's module that records every batch, and does something before one of them."""

    def prepare(module):
        generate_images = module.generate_images

        def wrapped(pipe, indices, *arguments, **keywords):
            if len(batches) == at:
                act()
            batches.append(list(indices))
            return generate_images(pipe, indices, *arguments, **keywords)

        module.generate_images = wrapped

    return prepare


def raise_error():
    raise RuntimeError("a fault for this test")


@pytest.fixture
def whole(run_here, flags, tmp_path):
    """A set of 10 images of 10 classes in both formats, made in one go."""
    run_here("generate", *flags, "--output_dir", tmp_path / "whole", "--format", "png", "npz")
    return tmp_path / "whole"


def test_set_holds_exactly_the_images_and_labels_that_were_asked_for(whole):
    pixels = pixels_in(whole)
    assert pixels.shape == (10, 32, 32, 3)
    assert pixels.std() > 1
    assert len(np.unique(pixels.reshape(10, -1), axis=0)) == 10
    with np.load(whole / "samples.npz") as arrays:
        assert (arrays["arr_0"] == pixels).all()
        assert arrays["arr_1"].tolist() == list(range(10))
    rows = [json.loads(line) for line in (whole / "images" / "metadata.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == list(range(10))
    recorded = settings_in(whole)
    assert recorded["settings"]["num_images"] == 10
    assert recorded["settings"]["guidance_scale"] == 1.5
    assert [run["batch_size"] for run in recorded["runs"]] == [4]
    assert {path.name for path in whole.iterdir()} == {".lock", "images", "samples.npz", "settings.json"}


def test_other_batch_sizes_give_the_same_set_up_to_rounding(run_here, flags, whole, tmp_path):
    run_here("generate", *flags, "--output_dir", tmp_path / "other", "--batch_size", 3)
    difference = pixels_in(tmp_path / "other").astype(int) - pixels_in(whole)
    assert abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


def test_continued_set_is_the_same_and_only_what_is_missing_is_made(run_here, flags, whole, tmp_path):
    folder, batches = tmp_path / "stopped", []
    command = ["generate", *flags, "--output_dir", folder]
    with pytest.raises(RuntimeError, match="a fault"):
        run_here(*command, prepare=recorder(batches, 1, raise_error))
    assert list(images_in(folder)) == [f"{index:06d}.png" for index in range(4)]
    (folder / "images" / "000002.png").unlink()
    (folder / "images" / ".000009.png.1.tmp").write_bytes(b"half")

    batches.clear()
    before = (folder / "images" / "000001.png").stat().st_mtime_ns
    run_here(*command, prepare=recorder(batches))
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]  # a batch is always made whole: its bits depend on it
    assert images_in(folder) == images_in(whole)
    assert (folder / "images" / "000001.png").stat().st_mtime_ns == before
    assert not list((folder / "images").glob(".*"))

    batches.clear()
    run_here(*command, prepare=recorder(batches))
    assert batches == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_after_the_batch_and_the_same_command_continues(
    run_here, flags, whole, tmp_path, capsys, number
):
    command = ["generate", *flags, "--output_dir", tmp_path / "stopped"]
    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=recorder([], 1, lambda: os.kill(os.getpid(), number)))
    assert caught.value.code == 128 + number
    assert f"Stopped by signal {number:d}: the same command continues." in capsys.readouterr().out
    assert len(images_in(tmp_path / "stopped")) == 8
    run_here(*command)
    assert "8 are done, 2 are to be made" in capsys.readouterr().out
    assert images_in(tmp_path / "stopped") == images_in(whole)


def test_npz_alone_leaves_no_png_files_and_is_made_once(run_here, flags, whole, tmp_path):
    folder, batches = tmp_path / "npz", []
    command = ["generate", *flags, "--output_dir", folder, "--format"]
    run_here(*command, "npz")
    assert {path.name for path in folder.iterdir()} == {".lock", "samples.npz", "settings.json"}
    assert (folder / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    run_here(*command, "npz", prepare=recorder(batches))
    assert batches == []
    # files that are asked for later are made again, and are the same
    run_here(*command, "png", "npz", prepare=recorder(batches))
    assert len(batches) == 3
    assert images_in(folder) == images_in(whole)


def test_npz_can_be_made_of_a_finished_folder(run_here, flags, whole, tmp_path):
    (whole / "samples.npz").rename(tmp_path / "expected.npz")
    batches = []
    run_here("generate", *flags, "--output_dir", whole, "--format", "png", "npz", prepare=recorder(batches))
    assert batches == []
    assert (whole / "samples.npz").read_bytes() == (tmp_path / "expected.npz").read_bytes()


def test_signal_during_the_assembly_leaves_no_npz_and_the_same_command_makes_it(run_here, flags, whole, tmp_path):
    command = ["generate", *flags, "--output_dir", tmp_path / "stopped", "--format", "npz"]

    def stop_in_assembly(module):
        module.write_npz = signal_before(module.write_npz, 1)

    with pytest.raises(SystemExit) as caught:
        run_here(*command, prepare=stop_in_assembly)
    assert caught.value.code == 143
    assert not list((tmp_path / "stopped").glob("*.npz*"))
    assert len(images_in(tmp_path / "stopped")) == 10
    run_here(*command)
    assert (tmp_path / "stopped" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_classes_are_named_or_drawn_and_unequal_counts_are_announced(run_here, flags, tmp_path, capsys):
    some = [*flags, "--class_labels", "goldfish,7", "4", "--format", "png"]
    run_here("generate", *some, "--output_dir", tmp_path / "balanced")
    assert "10 images of 3 classes, 3 each, and one more of the first 1." in capsys.readouterr().out
    run_here("generate", *some, "--output_dir", tmp_path / "random", "--label_draw", "random", "--seed", 1)

    def labels(name):
        lines = (tmp_path / name / "images" / "metadata.jsonl").read_text().splitlines()
        return [json.loads(line)["label"] for line in lines]

    assert labels("balanced") == [1, 7, 4, 1, 7, 4, 1, 7, 4, 1]
    assert labels("random") != labels("balanced")
    assert set(labels("random")) <= {1, 7, 4}


def test_sampler_flags_reach_the_pipeline(run_here, flags, whole, tmp_path):
    more = ["--scheduler", "heun", "--guidance_interval", 0.1, 0.6, "--dtype", "bfloat16", "--rounding", "truncate"]
    run_here("generate", *flags, *more, "--output_dir", tmp_path / "out")
    recorded = settings_in(tmp_path / "out")["settings"]
    assert recorded["scheduler"]["name"] == "FlowMatchHeunScheduler"
    assert recorded["guidance_interval"] == [0.1, 0.6]
    assert (recorded["dtype"], recorded["rounding"]) == ("bfloat16", "truncate")
    assert images_in(tmp_path / "out") != images_in(whole)


def test_set_of_other_settings_is_refused(run_here, flags, whole):
    before = images_in(whole)
    with pytest.raises(ValueError, match="num_inference_steps: 3 there, 5 now"):
        run_here("generate", *flags, "--output_dir", whole, "--num_inference_steps", 5)
    (whole / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has images but no settings\.json"):
        run_here("generate", *flags, "--output_dir", whole)
    assert images_in(whole) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--class_labels", "pike"], "'pike' is not a class name"),
        (["--class_labels", "12"], r"must lie in \[0, 9\]"),
        (["--guidance_method", "gft"], "needs a `transformer` trained for it"),
        (["--guidance_scale", "1", "--guidance_interval", "0", "0.5"], "has no effect at scale 1"),
    ],
)
def test_what_the_pipeline_cannot_do_is_refused_before_anything_is_recorded(run_here, flags, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run_here("generate", *flags, *more, "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_images", "0"], "`num_images` must be at least 1, got 0"),
        (["--format", "gif"], "`format` must name one or both of png, npz"),
        (["--steps", "5"], "unrecognized arguments: --steps 5"),
        (["--scheduler", "rk4"], "invalid choice: 'rk4'"),
    ],
)
def test_bad_command_line_is_refused_with_its_flag(run_here, flags, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as caught:
        run_here("generate", *flags, *more, "--output_dir", tmp_path / "out")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_launchers_mixed_precision_is_refused_since_it_would_be_ignored(run_here, flags, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="`mixed_precision` of the launcher is 'bf16', which has no effect here"):
        run_here("generate", *flags, "--output_dir", tmp_path / "out")


@pytest.mark.slow
def test_two_processes_that_are_killed_and_continued_give_the_set_of_one(launch, flags, tmp_path):
    conftest = sys.modules[launch.__module__]
    flags = [*flags, "--num_images", 123, "--num_inference_steps", 40, "--format", "png", "npz"]
    one = launch("generate", *flags, "--output_dir", tmp_path / "one")
    assert one.returncode == 0, one.stdout

    command = conftest.launch_command("generate", *flags, "--output_dir", tmp_path / "two", processes=2)
    start_and_kill(command, lambda: len(images_in(tmp_path / "two")) >= 20, conftest.launch_environment())
    assert 20 <= len(images_in(tmp_path / "two")) < 123
    assert not (tmp_path / "two" / "samples.npz").exists()

    again = launch("generate", *flags, "--output_dir", tmp_path / "two", processes=2)
    assert again.returncode == 0, again.stdout
    assert images_in(tmp_path / "two") == images_in(tmp_path / "one")
    assert (tmp_path / "two" / "samples.npz").read_bytes() == (tmp_path / "one" / "samples.npz").read_bytes()
    one, two = settings_in(tmp_path / "one"), settings_in(tmp_path / "two")
    assert one["settings"] == two["settings"]
    assert [run["num_processes"] for run in two["runs"]] == [2]


def test_an_early_checkpoint_guides_a_later_one(run_here, flags, pipeline_folder, tmp_path):
    weak = tiny_pipeline("sde", NAMES).transformer
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.5)
    weak.save_pretrained(tmp_path / "weak")
    guided = ["--guidance_transformer_name_or_path", tmp_path / "weak"]
    run_here("generate", *flags, "--output_dir", tmp_path / "plain")
    run_here("generate", *flags, *guided, "--output_dir", tmp_path / "guided")
    assert settings_in(tmp_path / "guided")["settings"]["guidance_method"] == "autoguidance"
    assert "guidance_transformer" in settings_in(tmp_path / "guided")["settings"]["digests"]
    assert (pixels_in(tmp_path / "plain") != pixels_in(tmp_path / "guided")).any()


@pytest.mark.parametrize("more", [["--guidance_method", "cfg"], ["--guidance_scale", 1]])
def test_a_weak_model_that_would_not_be_used_is_refused(run_here, flags, tmp_path, more):
    tiny_pipeline("sde", NAMES).transformer.save_pretrained(tmp_path / "weak")
    guided = ["--guidance_transformer_name_or_path", tmp_path / "weak", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="`guidance_transformer_name_or_path` has no effect"):
        run_here("generate", *flags, *guided, *more)
