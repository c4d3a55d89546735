"""Checkpoints that are complete or absent, and runs that continue exactly or refuse to.

A checkpoint is written under a temporary name in the folder where it will stay, flushed to the disk, and only then
renamed to `checkpoint-<step>`; the rename is the moment at which it exists. Models are saved by `save_pretrained` into
subfolders, so that a checkpoint's tokenizer or transformer (and its moving average, `<name>_ema`) can be loaded like
any other; everything is saved whole, however it was sharded in training. No random state is needed for an exact
continuation, since every draw is keyed by the step, and the position in the data follows from the step as well; those
of the processes are saved all the same, by accelerate.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import DistributedType
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from .disk_space import check_disk_space, checkpoint_size
from .resumption import (
    STATE_FILE,
    check_identity,
    complete_checkpoints,
    find_checkpoint,
    remove_partial_checkpoints,
)
from .sharding import (
    gather_optimizer_state,
    gather_tensors,
    load_optimizer_state,
    load_tensors,
    named_averages,
    whole_copy,
)


CONFIG_NAME = "config.json"
SCALER_FILE = "scaler.pt"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the previous one is intact."""


class ResumedState(NamedTuple):
    """
    Where a run continues.

    Attributes:
        step (`int`): Optimisation steps done.
        training_seconds (`float`): Seconds spent on them.
        extra (`dict[str, Any]`): What was given to [`~Checkpointer.save`]; empty for a new run.
    """

    step: int
    training_seconds: float
    extra: dict[str, Any]


class Checkpointer:
    """
    Saves, finds, rotates and loads the checkpoints of one run.

    Every process of the run must make the same calls.

    Args:
        accelerator (`Accelerator`):
            It must hold the prepared optimisers, all of which are saved, in the order of their preparation.
        output_dir (`str` or `Path`):
            Folder of the checkpoints, on a file system that all processes share.
        identity (`Mapping[str, Any]`):
            What determines the run's states, in plain types: recipe, seed, data set, batch geometry. A checkpoint of
            another identity is refused.
        models (`Mapping[str, ModelMixin]`):
            The models to save, unwrapped, by subfolder name.
        ema (`Mapping[str, EMAModel]`):
            Moving averages of some or all of `models`, under the same names, made after `accelerator.prepare`.
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
        self._is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED

    def check_disk_space(self) -> int:
        """
        Ask before the first step whether checkpoints will fit into `output_dir`; warn if not all that are to be kept.

        Returns:
            `int`: Bytes of a checkpoint.

        Raises:
            ValueError: On every process, if not even one more fits.
        """
        size = checkpoint_size([*self.models.values(), *self.modules.values()], self.ema.values())
        free = shutil.disk_usage(self.output_dir).free if self.accelerator.is_main_process else 0
        # one measurement for all, so that no process starts alone
        free = self.accelerator.gather(torch.tensor([free], device=self.accelerator.device))[0].item()
        existing = len(complete_checkpoints(self.output_dir))
        check_disk_space(str(self.output_dir), free, size, self.total_limit, existing)
        return size

    def save(
        self,
        step: int,
        training_seconds: float,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Write `checkpoint-<step>`, then remove the oldest ones beyond the limit.

        Args:
            step (`int`): Optimisation steps done.
            training_seconds (`float`): Time spent on them, over all resumptions.
            extra (`Mapping[str, Any]`, *optional*): Further small state in plain types, such as counts; `load` gives
                it back.

        Raises:
            CheckpointError: On every process, if any process failed, for example on a full disk.
        """
        final = self.output_dir / f"checkpoint-{step}"
        unfinished = self.output_dir / f".checkpoint-{step}.partial"
        if (final / STATE_FILE).is_file():
            return  # the states of a run are determined by its identity, so this is the same checkpoint
        state = {
            "step": step,
            "training_seconds": training_seconds,
            "extra": dict(extra or {}),
            "ema_steps": {name: ema.optimization_step for name, ema in self.ema.items()},
            "identity": self.identity,
        }
        self._on_main_process(lambda: _fresh_folder(unfinished), final, unfinished)
        for write in self._gathered(unfinished):
            self._on_main_process(write, final, unfinished)
        self._on_all_processes(lambda: self._write_own(unfinished), final, unfinished)
        self._on_main_process(lambda: _complete(unfinished, final, state), final, unfinished)
        if self.accelerator.is_main_process:
            for old in complete_checkpoints(self.output_dir)[: -self.total_limit]:
                _retire(old)
        self.accelerator.wait_for_everyone()

    def add_to_configs(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Add to the configs of models in `checkpoint-<step>` what takes longer to find out than a checkpoint should wait
        for, such as statistics of the latents of these very weights. The models in training keep their config.

        Args:
            step (`int`): Optimisation steps done.
            configs (`Mapping[str, Mapping[str, Any]]`): Config values by model folder (`<name>` or `<name>_ema`).

        Raises:
            ValueError: If `configs` names a folder that is not there.
            CheckpointError: On every process, if they could not be written; the checkpoint is as it was.
        """
        folders = {*self.models, *(f"{name}_ema" for name in self.ema)}
        if not configs.keys() <= folders:
            raise ValueError(
                f"`configs` names {sorted(configs.keys() - folders)}, but the model folders are {sorted(folders)}."
            )
        checkpoint = self.output_dir / f"checkpoint-{step}"

        def write() -> None:
            for folder, values in configs.items():
                path = checkpoint / folder / CONFIG_NAME
                write_json(path, json.loads(path.read_text(encoding="utf-8")) | dict(values))

        self._on_main_process(write, checkpoint, None)

    def load(self, resume_from: str) -> ResumedState:
        """
        Continue from a checkpoint.

        Args:
            resume_from (`str`): `"latest"`, `"none"`, or the path of a checkpoint.

        Returns:
            [`ResumedState`]: Optimisation steps done, seconds spent on them, and the `extra` state of the checkpoint;
            zeros and nothing for a new run.

        Raises:
            ValueError: If the checkpoint does not exist or is incomplete, if it belongs to another run (the message
                lists the differing settings), or if going back to it would leave newer checkpoints in the folder.
            CheckpointError: If the folder cannot be written or is not the same for all processes.
        """
        self._on_main_process(lambda: remove_partial_checkpoints(self.output_dir), self.output_dir, None)
        self._check_shared_folder()
        path = find_checkpoint(self.output_dir, resume_from)
        self._check_agreement("the checkpoint to continue from", "" if path is None else path.name)
        if path is None:
            return ResumedState(0, 0.0, {})
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        check_identity(path, state["identity"], self.identity)
        if self._is_deepspeed:
            self.accelerator.load_state(str(path))
        else:
            self._load_trained(path)
        for name, ema in self.ema.items():
            average = type(self.models[name]).from_pretrained(path / f"{name}_ema")
            load_tensors(named_averages(self.models[name], ema), dict(average.named_parameters()))
            ema.optimization_step = state["ema_steps"][name]
        # Accelerate counts micro-batches; a checkpoint lies between steps whatever the accumulation was.
        self.accelerator.step = 0
        return ResumedState(state["step"], state["training_seconds"], state["extra"])

    def _check_shared_folder(self) -> None:
        """Every process must see what the first one writes: better asked now than at the first checkpoint."""
        if self.accelerator.num_processes == 1:
            return
        # a name that no process, and so no cache of a network file system, has looked for before
        number = torch.tensor([time.time_ns()], device=self.accelerator.device)
        marker = self.output_dir / f".seen-{self.accelerator.gather(number)[0].item()}.partial"
        self._on_main_process(marker.mkdir, self.output_dir, None)
        self._on_all_processes(lambda: self._check_seen(marker), self.output_dir, marker)
        self._on_main_process(marker.rmdir, self.output_dir, None)

    def _check_agreement(self, what: str, found: str) -> None:
        """Processes that each look for themselves must see the same: a file system may be slow to show a change."""
        number = torch.tensor([int(hashlib.blake2b(found.encode(), digest_size=7).hexdigest(), 16)])
        numbers = self.accelerator.gather(number.to(self.accelerator.device))
        if (numbers != numbers[0]).any():
            raise ValueError(
                f"The processes do not agree on {what} (process {self.accelerator.process_index}: {found or 'none'}): "
                f"is {self.output_dir} the same folder for all of them? If it is, run the command again."
            )

    def _check_seen(self, path: Path) -> None:
        if not path.exists():
            raise OSError(f"process {self.accelerator.process_index} does not see {path}: use a shared file system")

    def _gathered(self, folder: Path) -> Iterator[Callable[[], None]]:
        """
        What the main process has to write, one file or subfolder at a time.

        Advancing the iterator gathers, which all processes do together; calling what it yields writes, and may fail.
        """
        keep = self.accelerator.is_main_process
        for name, model in self.models.items():
            yield partial(_save_model, whole_copy(model, keep=keep), folder / name)
            if name in self.ema:
                yield partial(_save_model, whole_copy(model, self.ema[name], keep=keep), folder / f"{name}_ema")
        for name, module in self.modules.items():
            yield partial(save_file, gather_tensors(module.state_dict(), keep=keep), folder / f"{name}.safetensors")
        if self._is_deepspeed:
            return
        for number, optimizer in enumerate(self.accelerator._optimizers):
            yield partial(torch.save, gather_optimizer_state(optimizer, keep), folder / _optimizer_file(number))
        if self.accelerator.scaler is not None:
            yield partial(torch.save, self.accelerator.scaler.state_dict(), folder / SCALER_FILE)

    def _write_own(self, folder: Path) -> None:
        """What every process writes for itself."""
        self._check_seen(folder)
        if self._is_deepspeed:
            self.accelerator.save_state(str(folder))
        else:
            save_accelerator_state(str(folder), [], [], [], [], self.accelerator.process_index, step=0)
        if self.accelerator.is_local_main_process:
            flush_to_disk(folder)

    def _load_trained(self, path: Path) -> None:
        for name, model in self.models.items():
            load_tensors(model.state_dict(), type(model).from_pretrained(path / name).state_dict())
        for name, module in self.modules.items():
            load_tensors(module.state_dict(), load_file(path / f"{name}.safetensors"))
        for number, optimizer in enumerate(self.accelerator._optimizers):
            state = torch.load(path / _optimizer_file(number), map_location="cpu", weights_only=True)
            load_optimizer_state(optimizer, state)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(torch.load(path / SCALER_FILE, weights_only=True))
        load_accelerator_state(str(path), [], [], [], [], self.accelerator.process_index)

    def _on_main_process(self, action: Callable[[], None], final: Path, unfinished: Path | None) -> None:
        self._on_all_processes(action if self.accelerator.is_main_process else lambda: None, final, unfinished)

    def _on_all_processes(self, action: Callable[[], None], final: Path, unfinished: Path | None) -> None:
        """Run `action` and fail together: a process that goes on alone would wait forever for the others."""
        error = None
        try:
            action()
        except Exception as caught:
            error = caught
        failures = self.accelerator.gather(torch.tensor([error is not None], device=self.accelerator.device))
        if not failures.any():
            return
        if unfinished is not None and self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        ranks = failures.nonzero().flatten().tolist()
        raise CheckpointError(
            f"{final} could not be written (process {', '.join(map(str, ranks))}: {error or 'see its own message'}). "
            "Earlier checkpoints are intact: make room or fix the folder, then run the same command again."
        ) from error


def data_identity(source: Any) -> dict[str, Any]:
    """
    What makes a data set the same one, wherever it lies: its layout, its classes, its first rows, and the names of its
    files; of a folder of images also their sizes and classes. No more is read, so files that were rewritten under
    their names with as many rows are not noticed.

    Args:
        source ([`~maetok_hf.data.ImageSource`]): The data set.

    Returns:
        `dict`: Plain values.
    """
    digest = hashlib.blake2b(digest_size=16)
    for table in (source.chunk_shards, source.chunk_sizes):
        digest.update(np.ascontiguousarray(table, dtype=np.int64).tobytes())
    for image, *others in source.read_chunk(0):
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path") or ""
        if isinstance(image, str):
            # A path says where a file lies on this machine; its name is enough where the bytes are not at hand.
            image = os.path.basename(image)
        digest.update(repr((image, *others)).encode())
    for entry in source.listing():
        digest.update(repr(entry).encode())
    classes = list(source.columns.class_names or [])
    return {"num_rows": int(source.num_rows), "classes": classes, "digest": digest.hexdigest()}


def model_digest(model: torch.nn.Module, exclude: str | None = None) -> str:
    """
    A short text that changes with any weight or config value of a model.

    Args:
        model (`torch.nn.Module`): The model.
        exclude (`str`, *optional*): Beginning of the names of weights and settings that do not count.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    ignored = ("_",) if exclude is None else ("_", exclude)  # no paths, no versions
    settings = {name: value for name, value in model.config.items() if not name.startswith(ignored)}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        if exclude is not None and name.startswith(exclude):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _save_model(model: ModelMixin, path: Path) -> None:
    model.save_pretrained(path)


def _optimizer_file(number: int) -> str:
    """The name that accelerate gives to the file of an optimiser."""
    return f"optimizer_{number}.bin" if number else "optimizer.bin"


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
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole or absent, flushed to the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
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


def _retire(path: Path) -> None:
    """Remove a folder that must not be found half removed: the next run clears what an interruption leaves."""
    retired = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(OSError):  # an old checkpoint too many does no harm
        path.rename(retired)
        shutil.rmtree(retired)


def _complete(partial: Path, final: Path, state: Mapping[str, Any]) -> None:
    write_json(partial / STATE_FILE, state)
    _flush_folder(partial)
    if final.exists():
        shutil.rmtree(final)  # no state file: not a checkpoint
    partial.rename(final)
    _flush_folder(final.parent)
