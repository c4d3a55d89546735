"""Losses and pictures in TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

The trackers are made and configured by the script's `Accelerator`; what is here keeps them from stopping a run, and
makes a run that was resumed one run:

```python
check_tracker(options.report_to)
accelerator = Accelerator(log_with=None if options.report_to == "none" else options.report_to, project_dir=...)
...  # the checkpoint is loaded: first_step is known
if accelerator.is_main_process:
    accelerator.init_trackers(
        options.tracker_project_name,
        config=tracker_config(settings) if first_step == 0 else None,
        init_kwargs=tracker_init_kwargs(options.report_to, output_dir, first_step),
    )
trackers = Trackers(accelerator.trackers)
```
"""

import importlib.util
import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


logger = logging.getLogger(__name__)

RUN_FILE = "tracker_run.json"
MAX_FAILURES = 3


def check_tracker(report_to: str) -> None:
    """
    Refuse a tracker that cannot work, before anything else is done: accelerate leaves it out silently.

    Args:
        report_to (`str`): `"tensorboard"`, `"wandb"`, `"trackio"`, or `"none"`.

    Raises:
        ValueError: If its package is not installed.
    """
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ValueError(
            f"`report_to` is {report_to!r}, but that package is not installed: `pip install {report_to}`, or use "
            "`--report_to none` (training_log.jsonl is written in any case)."
        )


def tracker_init_kwargs(report_to: str, output_dir: str | Path, first_step: int) -> dict[str, dict[str, Any]]:
    """
    `init_kwargs` of `Accelerator.init_trackers` with which a resumed run continues its curves.

    TensorBoard hides what was logged after the checkpoint. Weights & Biases continues the run of the same id, and
    ignores steps that it has already. trackio continues the run of the same name, and shows steps after the checkpoint
    twice, with the same values. Name and id are kept in `output_dir`; a run that begins at step 0 gets new ones, so
    that a folder that is used again does not continue a stranger's curves.

    Args:
        report_to (`str`): `"tensorboard"`, `"wandb"`, `"trackio"`, or `"none"`.
        output_dir (`str` or `Path`): Folder of the run. Only one process may call this.
        first_step (`int`): Steps done in the checkpoint from which the run continues.

    Returns:
        `dict[str, dict[str, Any]]`: Arguments by tracker.
    """
    if report_to == "tensorboard":
        return {"tensorboard": {"purge_step": first_step + 1}}  # an entry bears the number of steps done
    if report_to == "none":
        return {}
    name = _run_name(Path(output_dir), first_step)
    if report_to == "trackio":
        return {"trackio": {"name": name, "resume": "allow"}}
    return {"wandb": {"id": name, "name": Path(output_dir).resolve().name, "resume": "allow", "dir": str(output_dir)}}


def tracker_config(settings: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """
    Settings in the form that every tracker takes: one level, plain values.

    Args:
        settings (`Mapping[str, Any]`): Nested mappings, such as dataclasses turned into dicts.

    Returns:
        `dict[str, str | int | float | bool]`: Dotted names; lists and `None` as text.
    """
    flat: dict[str, str | int | float | bool] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": item for key, item in tracker_config(value).items()}
        else:
            flat[name] = value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)
    return flat


class Trackers:
    """
    Trackers of which none can stop a run: one that fails, for lack of a network or of disk space, is reported once,
    and given up when it has failed three times in a row.

    Args:
        trackers (`list`): The trackers of accelerate, `accelerator.trackers`; an empty list on processes that do not
            write.
    """

    def __init__(self, trackers: list[Any]):
        self._given = trackers
        self._reported: set[str] = set()
        self._failures = dict.fromkeys((tracker.name for tracker in trackers), 0)  # in a row

    def log(self, values: Mapping[str, float | None], step: int) -> None:
        """
        Log values.

        Args:
            values (`Mapping[str, float | None]`): Values by name; those that are `None` are left out.
            step (`int`): Steps done.
        """
        known = {name: value for name, value in values.items() if value is not None}
        self._each(lambda tracker: tracker.log(known, step=step), f"step {step}")

    def log_image(self, name: str, picture: np.ndarray, step: int) -> None:
        """
        Log a picture.

        Args:
            name (`str`): Name of the picture.
            picture (`numpy.ndarray` of shape `(height, width, 3)`): The picture, uint8.
            step (`int`): Steps done.
        """
        self._each(lambda tracker: _log_image(tracker, name, picture, step), f"picture {name!r} of step {step}")

    def close(self) -> None:
        """End all runs, and take them from accelerate, which would let one that fails end the process."""
        self._each(lambda tracker: tracker.finish(), "the end of the run")
        self._given.clear()

    def _each(self, action: Callable[[Any], None], what: str) -> None:
        for tracker in self._given:
            if self._failures[tracker.name] == MAX_FAILURES:
                continue
            try:
                action(tracker)
            except Exception as error:
                self._count_failure(tracker.name, what, error)
            else:
                self._failures[tracker.name] = 0

    def _count_failure(self, name: str, what: str, error: Exception) -> None:
        self._failures[name] += 1
        if name not in self._reported:
            self._reported.add(name)
            logger.warning("%s did not take %s; training goes on without it: %s", name, what, error)
        if self._failures[name] == MAX_FAILURES:
            logger.warning("%s failed %d times in a row and is given up.", name, MAX_FAILURES)


def _log_image(tracker: Any, name: str, picture: np.ndarray, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":  # accelerate's tracker of it has no pictures
        import trackio

        tracker.log({name: trackio.Image(picture)}, step=step)
    else:
        tracker.log_images({name: [picture]}, step=step)


def _run_name(output_dir: Path, first_step: int) -> str:
    """Name of the folder and a random part, for characters and length that every tracker takes in an id."""
    path = output_dir / RUN_FILE
    if first_step > 0 and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))["name"]
    folder = re.sub(r"[^A-Za-z0-9_-]+", "-", output_dir.resolve().name)[:64]
    name = f"{folder}-{secrets.token_hex(4)}"
    path.write_text(json.dumps({"name": name}) + "\n", encoding="utf-8")
    return name
