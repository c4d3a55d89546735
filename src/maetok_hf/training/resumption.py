"""Which checkpoint a run continues from, and whether it may."""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any


STATE_FILE = "trainer_state.json"
# Settings that change how long a run is or what is measured at its end, not the states it passes through. A cosine
# schedule depends on `max_train_steps`, but prolonging a run is the ordinary reason to resume a finished one.
CHANGEABLE_SETTINGS = frozenset(
    {"recipe.max_train_steps", "recipe.latent_statistics", "recipe.latent_statistics_images"}
)


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; folders without a state file do not count."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: str | Path, resume_from: str) -> Path | None:
    """
    The checkpoint to continue from.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        resume_from (`str`): `"latest"`, `"none"`, or a path (a bare `checkpoint-<step>` is looked up in `output_dir`).

    Returns:
        `Path` or `None`: `None` for a new run.

    Raises:
        ValueError: If the path is no complete checkpoint, if newer checkpoints lie beside it, or if a new run is asked
            for in a folder that has checkpoints.
    """
    output_dir = Path(output_dir)
    existing = complete_checkpoints(output_dir)
    if resume_from == "latest":
        return existing[-1] if existing else None
    if resume_from == "none":
        if existing:
            raise ValueError(
                f"`output_dir` {output_dir} has checkpoints of an earlier run ({existing[-1].name}): resume it with "
                "`--resume_from_checkpoint latest`, or choose another folder."
            )
        return None
    path = Path(resume_from)
    if not path.is_dir() and (output_dir / resume_from).is_dir():
        path = output_dir / resume_from
    if not (path / STATE_FILE).is_file():
        raise ValueError(
            f"`resume_from_checkpoint` {resume_from!r} is not a complete checkpoint (it has no {STATE_FILE}). "
            f"Complete ones in {output_dir}: {', '.join(item.name for item in existing) or 'none'}."
        )
    step = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["step"]
    newer = [item.name for item in existing if int(item.name.removeprefix("checkpoint-")) > step]
    if newer:
        raise ValueError(
            f"`resume_from_checkpoint` {resume_from!r} is at step {step}, but {output_dir} also has "
            f"{', '.join(newer)}: continue from the newest with `--resume_from_checkpoint latest`, or go back in "
            "another `output_dir`."
        )
    return path


def check_identity(path: Path, recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """
    Refuse to continue a run with other settings.

    Args:
        path (`Path`): The checkpoint, for the message.
        recorded (`Mapping[str, Any]`): Identity in the checkpoint.
        current (`Mapping[str, Any]`): Identity of this run.

    Raises:
        ValueError: If a setting differs, unless it is one of `CHANGEABLE_SETTINGS`.
    """
    old, new = _flatten(recorded), _flatten(current)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    refused = sorted(changed - CHANGEABLE_SETTINGS)
    if refused:
        lines = "\n".join(f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now" for name in refused)
        raise ValueError(
            f"{path} belongs to a run with other settings:\n{lines}\n"
            "Use the same settings, or choose another `output_dir` for a new run."
        )
    for name in sorted(changed):
        warnings.warn(f"{name} is {new[name]} now and was {old[name]} in {path}.", stacklevel=2)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def remove_partial_checkpoints(output_dir: str | Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in Path(output_dir).glob(".*.partial"):
        shutil.rmtree(path)
