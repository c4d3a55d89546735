"""Checkpoints that are complete or absent, and runs that continue exactly or refuse to.

A checkpoint is written under a temporary name in the folder where it will stay, flushed to the disk, and only then
renamed to `checkpoint-<step>`; the rename is the moment at which it exists. Optimisers and the gradient scaler go
through accelerate; models are saved by `save_pretrained` into subfolders, so that a checkpoint's tokenizer or
transformer (and its moving average, `<name>_ema`) can be loaded like any other. No random state is needed for an exact
continuation, since every draw is keyed by the step, and the position in the data follows from the step as well.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file


STATE_FILE = "trainer_state.json"
# Settings that change how long a run is or what is measured at its end, not the states it passes through. A cosine
# schedule depends on `max_train_steps`, but prolonging a run is the ordinary reason to resume a finished one.
CHANGEABLE_SETTINGS = frozenset(
    {"recipe.max_train_steps", "recipe.latent_statistics", "recipe.latent_statistics_images"}
)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


class Checkpointer:
    """
    Saves, finds, rotates and loads the checkpoints of one run.

    Every process of the run must make the same calls.

    Args:
        accelerator (`Accelerator`):
            It must hold the prepared optimiser; its registered hooks are extended.
        output_dir (`str` or `Path`):
            Folder of the checkpoints, on a file system that all processes share.
        identity (`Mapping[str, Any]`):
            What determines the run's states, in plain types: recipe, seed, data set, batch geometry. A checkpoint of
            another identity is refused.
        models (`Mapping[str, ModelMixin]`):
            The models to save, unwrapped, by subfolder name.
        ema (`Mapping[str, EMAModel]`):
            Moving averages of some or all of `models`, under the same names.
        modules (`Mapping[str, torch.nn.Module]`, *optional*):
            Further trained modules that are no `ModelMixin`, such as auxiliary decoders; their state is saved as
            `<name>.safetensors`.
        total_limit (`int`, *optional*, defaults to 2):
            Complete checkpoints to keep, the newest ones.

    Raises:
        ValueError: If an EMA has no model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        identity: Mapping[str, Any],
        *,
        models: Mapping[str, ModelMixin],
        ema: Mapping[str, EMAModel],
        modules: Mapping[str, torch.nn.Module] | None = None,
        total_limit: int = 2,
    ):
        if not set(ema) <= set(models):
            raise ValueError(f"`ema` has names that `models` lacks: {sorted(set(ema) - set(models))}.")
        self.accelerator = accelerator
        self.output_dir = Path(output_dir)
        self.identity = json.loads(json.dumps(identity))
        self.models = dict(models)
        self.ema = dict(ema)
        self.modules = dict(modules or {})
        self.total_limit = total_limit
        accelerator.register_save_state_pre_hook(self._save_models)
        accelerator.register_load_state_pre_hook(self._load_models)

    def save(self, step: int, training_seconds: float) -> None:
        """
        Write `checkpoint-<step>`, then remove the oldest ones beyond the limit.

        Args:
            step (`int`): Optimisation steps done.
            training_seconds (`float`): Time spent on them, over all resumptions.

        Raises:
            CheckpointError: On every process, if any process failed, for example on a full disk.
        """
        final = self.output_dir / f"checkpoint-{step}"
        partial = self.output_dir / f".checkpoint-{step}.partial"
        if (final / STATE_FILE).is_file():
            return  # the states of a run are determined by its identity, so this is the same checkpoint
        state = {"step": step, "training_seconds": training_seconds, "identity": self.identity}
        self._on_main_process(lambda: _fresh_folder(partial), final, partial)
        self._on_all_processes(lambda: self._write(partial), final, partial)
        self._on_main_process(lambda: _complete(partial, final, state), final, partial)
        if self.accelerator.is_main_process:
            for old in complete_checkpoints(self.output_dir)[: -self.total_limit]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def load(self, resume_from: str) -> tuple[int, float]:
        """
        Continue from a checkpoint.

        Args:
            resume_from (`str`): `"latest"`, `"none"`, or the path of a checkpoint.

        Returns:
            `tuple[int, float]`: Optimisation steps done and seconds spent on them, zeros for a new run.

        Raises:
            ValueError: If the checkpoint does not exist or is incomplete, if it belongs to another run (the message
                lists the differing settings), or if going back to it would leave newer checkpoints in the folder.
        """
        self._on_main_process(lambda: remove_partial_checkpoints(self.output_dir), self.output_dir, None)
        path = find_checkpoint(self.output_dir, resume_from)
        if path is None:
            return 0, 0.0
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        check_identity(path, state["identity"], self.identity)
        self.accelerator.load_state(str(path))
        # Accelerate counts micro-batches; a checkpoint lies between steps whatever the accumulation was.
        self.accelerator.step = 0
        for ema in self.ema.values():
            ema.optimization_step = state["step"]
        return state["step"], state["training_seconds"]

    def _write(self, partial: Path) -> None:
        if not partial.is_dir():
            raise OSError(f"process {self.accelerator.process_index} does not see {partial}: it needs a shared folder")
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_local_main_process:
            flush_to_disk(partial)

    def _save_models(self, models: list, weights: list, output_dir: str) -> None:
        # Emptied on every process: accelerate would save the wrapped modules beside our folders.
        weights.clear()
        if not self.accelerator.is_main_process:
            return
        for name, model in self.models.items():
            model.save_pretrained(os.path.join(output_dir, name))
            if name in self.ema:
                save_ema(self.ema[name], model, os.path.join(output_dir, f"{name}_ema"))
        for name, module in self.modules.items():
            tensors = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
            save_file(tensors, os.path.join(output_dir, f"{name}.safetensors"))

    def _load_models(self, models: list, input_dir: str) -> None:
        models.clear()
        for name, model in self.models.items():
            model.load_state_dict(type(model).from_pretrained(os.path.join(input_dir, name)).state_dict())
            if name in self.ema:
                average = type(model).from_pretrained(os.path.join(input_dir, f"{name}_ema"))
                with torch.no_grad():
                    for shadow, parameter in zip(self.ema[name].shadow_params, average.parameters(), strict=True):
                        shadow.copy_(parameter)
        for name, module in self.modules.items():
            module.load_state_dict(load_file(os.path.join(input_dir, f"{name}.safetensors")))

    def _on_main_process(self, action: Callable[[], None], final: Path, partial: Path | None) -> None:
        self._on_all_processes(action if self.accelerator.is_main_process else lambda: None, final, partial)

    def _on_all_processes(self, action: Callable[[], None], final: Path, partial: Path | None) -> None:
        """Run `action` and fail together: a process that goes on alone would wait forever for the others."""
        error = None
        try:
            action()
        except Exception as caught:
            error = caught
        failures = self.accelerator.gather(torch.tensor([error is not None], device=self.accelerator.device))
        if not failures.any():
            return
        if partial is not None and self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        ranks = failures.nonzero().flatten().tolist()
        raise CheckpointError(
            f"{final} could not be written (process {', '.join(map(str, ranks))}: {error or 'see its own message'}). "
            "Earlier checkpoints are intact: make room or fix the folder, then run the same command again."
        ) from error


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
            f"{', '.join(newer)}: remove those, or continue in another `output_dir`."
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


def data_identity(source: Any) -> dict[str, Any]:
    """
    What makes a data set the same one, wherever it lies: its layout, its classes and its first rows.

    Args:
        source ([`~maetok_hf.data.ImageSource`]): The data set.

    Returns:
        `dict`: Plain values.
    """
    digest = hashlib.blake2b(digest_size=16)
    for table in (source.chunk_shards, source.chunk_sizes):
        digest.update(np.ascontiguousarray(table, dtype=np.int64).tobytes())
    for image, label in source.read_chunk(0):
        if isinstance(image, Mapping):
            # A path says where a file lies on this machine; its name is enough where the bytes are not at hand.
            image = image.get("bytes") or os.path.basename(image.get("path") or "")
        digest.update(repr((image, label)).encode())
    classes = list(source.columns.class_names or [])
    return {"num_rows": int(source.num_rows), "classes": classes, "digest": digest.hexdigest()}


def model_digest(model: torch.nn.Module) -> str:
    """A short text that changes with any weight or config value of a model."""
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}  # no paths, versions
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def remove_partial_checkpoints(output_dir: str | Path) -> None:
    """Remove what interrupted saves left behind."""
    for path in Path(output_dir).glob(".*.partial"):
        shutil.rmtree(path)


def save_ema(ema: EMAModel, model: ModelMixin, path: str | Path) -> None:
    """
    Save a model with its averaged weights, leaving the model as it was.

    `EMAModel.save_pretrained` would also write its counters into the model's config.
    """
    ema.store(model.parameters())
    try:
        ema.copy_to(model.parameters())
        model.save_pretrained(path)
    finally:
        ema.restore(model.parameters())


def export(output_dir: str | Path, write: Callable[[Path], None]) -> None:
    """
    Put a model or pipeline into `output_dir`, replacing an earlier export.

    Everything is written and flushed under a temporary name first, so that an interrupted or failed export leaves the
    earlier one whole; the index files that loading begins with (`config.json`, `model_index.json`) are replaced last.

    Args:
        output_dir (`str` or `Path`): Folder that the export shares with the run's checkpoints and logs.
        write (`Callable[[Path], None]`): Saves into the folder it is given.
    """
    output_dir = Path(output_dir)
    partial = output_dir / ".export.partial"
    _fresh_folder(partial)
    write(partial)
    flush_to_disk(partial)
    for source in sorted(partial.iterdir(), key=lambda item: item.suffix == ".json"):
        target = output_dir / source.name
        if target.is_dir():
            retired = output_dir / f".{source.name}.partial"
            target.rename(retired)
            source.rename(target)
            shutil.rmtree(retired)
        else:
            os.replace(source, target)
    partial.rmdir()
    _flush_folder(output_dir)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole or absent, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flush_to_disk(folder: Path) -> None:
    """Force every file and folder below `folder`, and itself, from the system's cache to the disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _complete(partial: Path, final: Path, state: Mapping[str, Any]) -> None:
    write_json(partial / STATE_FILE, state)
    _flush_folder(partial)
    if final.exists():
        shutil.rmtree(final)  # no state file: not a checkpoint
    partial.rename(final)
    _flush_folder(final.parent)
