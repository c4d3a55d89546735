"""Trackers show one run however often it was resumed, and never stop it."""

import importlib.util
import logging
import sys
import time
import types

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maetok_hf.training.tracking import MAX_FAILURES, Trackers, check_tracker, tracker_config, tracker_init_kwargs


class RecordingTracker(GeneralTracker):
    """Keeps what it is given; with a network that is down it keeps nothing."""

    name = "recording"
    requires_logging_directory = False

    def __init__(self, name="recording"):
        super().__init__(_blank=True)
        self.name, self.calls, self.attempts, self.down = name, [], 0, False

    def _take(self, *call):
        self.attempts += 1
        if self.down:
            raise ConnectionError("no route to host")
        self.calls.append(call)

    def log(self, values, step=None, **kwargs):
        self._take("log", values, step)

    def log_images(self, values, step=None, **kwargs):
        self._take("log_images", values, step)

    def finish(self):
        self._take("finish")


def tensorboard_run(folder, first_step, steps, picture=None):
    """What a training script does with TensorBoard, from one start to its kill."""
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers(
        "project",
        config=tracker_config({"recipe": {"name": "tiny", "sizes": [1, 2]}}) if first_step == 0 else None,
        init_kwargs=tracker_init_kwargs("tensorboard", folder, first_step),
    )
    trackers = Trackers(accelerator.trackers)
    for step in steps:
        trackers.log({"loss": step / 10, "hog": None}, step)
        if picture is not None:
            trackers.log_image("reconstructions", picture, step)
    trackers.close()
    assert accelerator.trackers == []
    accelerator.end_training()


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    tensorboard_run(tmp_path, 0, range(1, 8))  # killed at step 7, its checkpoint is at step 5
    second = int(time.time())
    while int(time.time()) == second:  # by which files are named and read in order; runs share none
        time.sleep(0.05)
    tensorboard_run(tmp_path, 5, range(6, 10), picture)
    events = EventAccumulator(str(tmp_path / "project")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([step / 10 for step in range(1, 10)])
    assert events.Tags()["scalars"] == ["loss"], "values that are none are left out"
    image = events.Images("reconstructions")[0]
    assert (image.width, image.height, image.step) == (6, 4, 6)
    (settings,) = tmp_path.rglob("hparams.yml")  # written at the first start only
    assert yaml.safe_load(settings.read_text()) == {"recipe.name": "tiny", "recipe.sizes": "[1, 2]"}


def test_a_tracker_that_fails_is_reported_once_and_stops_neither_the_run_nor_the_others(caplog):
    broken, healthy = RecordingTracker("broken"), RecordingTracker("healthy")
    broken.down = True
    trackers = Trackers([broken, healthy])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 11):
            trackers.log({"loss": 1.0}, step)
        trackers.log_image("grid", np.zeros((2, 2, 3), dtype=np.uint8), 10)
        trackers.close()
    assert broken.attempts == MAX_FAILURES, "waiting for a timeout at every report would slow the run"
    assert len(healthy.calls) == 12 and healthy.calls[-1] == ("finish",)
    assert [record.getMessage() for record in caplog.records] == [
        "broken did not take step 1; training goes on without it: no route to host",
        "broken failed 3 times in a row and is given up.",
    ]


def test_a_tracker_that_recovers_is_used_again(caplog):
    tracker = RecordingTracker()
    trackers = Trackers([tracker])
    for step in range(10):
        tracker.down = step % 3 != 0  # two failures, then a success
        trackers.log({"loss": 1.0}, step)
    assert [step for _, _, step in tracker.calls] == [0, 3, 6, 9]
    assert len(caplog.records) == 1


def test_each_tracker_gets_pictures_in_its_own_form(monkeypatch):
    """wandb takes lists, TensorBoard one array of all; accelerate's trackio tracker takes trackio's own images."""
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(Image=lambda array: ("trackio image", array)))
    picture = np.zeros((2, 3, 3), dtype=np.uint8)
    wandb, trackio = RecordingTracker("wandb"), RecordingTracker("trackio")
    Trackers([wandb, trackio]).log_image("grid", picture, 7)
    assert wandb.calls == [("log_images", {"grid": [picture]}, 7)]
    assert trackio.calls == [("log", {"grid": ("trackio image", picture)}, 7)]


@pytest.mark.parametrize("report_to, identity", [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_keeps_its_identity_and_a_new_one_gets_its_own(tmp_path, report_to, identity):
    output_dir = tmp_path / "my run: #1"
    output_dir.mkdir()
    first = tracker_init_kwargs(report_to, output_dir, 0)[report_to]
    assert first["resume"] == "allow"
    assert first[identity].startswith("my-run-1-") and first[identity].isascii()
    assert tracker_init_kwargs(report_to, output_dir, 500)[report_to] == first
    assert tracker_init_kwargs(report_to, output_dir, 0)[report_to][identity] != first[identity]


def test_no_tracker_needs_no_arguments(tmp_path):
    check_tracker("none")
    assert tracker_init_kwargs("none", tmp_path, 0) == {}
    assert list(tmp_path.iterdir()) == []
    Trackers([]).log({"loss": 1.0}, 1)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    check_tracker("tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="`report_to` is 'wandb', .* `pip install wandb`, or use `--report_to none`"):
        check_tracker("wandb")


def test_settings_become_one_level_of_plain_values():
    settings = {"recipe": {"model": {"rope": True}, "sizes": [256, 512], "crop": "center"}, "options": {"seed": None}}
    assert tracker_config(settings) == {
        "recipe.model.rope": True,
        "recipe.sizes": "[256, 512]",
        "recipe.crop": "center",
        "options.seed": "null",
    }
