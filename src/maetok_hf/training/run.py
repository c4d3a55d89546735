"""What every training run needs around its steps: processes, folder, checkpoints, reports, stopping, uploads."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel

from .checkpointing import Checkpointer
from .hub import HubUpload
from .interruption import RunLock, StopRequest
from .progress import TrainingMonitor
from .recipes import OptimizationRecipe
from .resumption import complete_checkpoints
from .run_options import RunOptions
from .sharding import configure_sharding, full_tensor
from .stability import StepGuard
from .tracking import Trackers, check_tracker, tracker_config, tracker_init_kwargs


logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # of torch's launcher, in seconds

UPLOAD_TIMEOUT = 900.0
# whoever sends the signal, a cluster for example, will not wait for long
UPLOAD_TIMEOUT_AFTER_SIGNAL = 30.0


def accumulation_plugin(num_steps: int) -> GradientAccumulationPlugin:
    """
    Accumulation as the script's options say.

    Args:
        num_steps (`int`): `gradient_accumulation_steps` of the options.

    Returns:
        `GradientAccumulationPlugin`: For the `Accelerator`, which would otherwise prefer what the launcher says.

    Raises:
        ValueError: If the launcher says something else.
    """
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched not in ("1", "auto", str(num_steps)):
        raise ValueError(
            f"`gradient_accumulation_steps` is {num_steps} in the script and {launched} in the launcher's "
            "configuration: give it to the script, whose batches depend on it, and leave it out of the launcher's."
        )
    return GradientAccumulationPlugin(num_steps=num_steps)


class TrainingRun:
    """
    The processes of a run and the folder they write into.

    A script makes its models and optimisers with the help of `accelerator`, hands them to [`~TrainingRun.begin`], and
    then, for every step: adds loss terms, takes the step if its gradients allow, ends it, and saves when it is due.

    ```python
    run = TrainingRun(recipe, options, "tokenizer")
    ...
    for step in range(run.begin(...), recipe.max_train_steps):
        ...
        run.admit({"gradient_norm": norm})
        optimizer.step()
        if run.end_step(step, {"learning_rate": learning_rate}):
            run.save(step)
        if not run.stopping:
            ...  # what may take long
        run.leave_if_asked(step)
    run.end()
    ```

    Args:
        recipe ([`OptimizationRecipe`]): What is trained.
        options ([`RunOptions`]): Where, and how it is reported.
        description (`str`): A word or two for the progress bar.
        supports_deepspeed (`bool`, *optional*, defaults to `False`): See [`configure_sharding`].

    Attributes:
        accelerator (`Accelerator`): Prepares models and optimisers.
        device (`torch.device`): Where this process computes.
        output_dir (`Path`): The folder; it exists.

    Raises:
        ValueError: If the tracker's package is missing, the launcher's configuration is one that the run cannot work
            under, or another process uses the folder.
    """

    def __init__(
        self,
        recipe: OptimizationRecipe,
        options: RunOptions,
        description: str,
        supports_deepspeed: bool = False,
    ):
        check_tracker(options.report_to)
        self.recipe, self.options, self.description = recipe, options, description
        self.output_dir = Path(options.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_plugin=accumulation_plugin(options.gradient_accumulation_steps),
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
        )
        self.device = self.accelerator.device
        main = self.accelerator.is_main_process
        logging.basicConfig(format="%(message)s")  # at the level of warnings: HTTP clients log every request below it
        logging.getLogger("maetok_hf").setLevel(logging.INFO if main else logging.WARNING)
        if self.accelerator.state.dynamo_plugin.backend != "NO":
            raise ValueError(
                f"`dynamo_backend` of the launcher is {self.accelerator.state.dynamo_plugin.backend}, which compiles "
                "the losses as well: set it to `no` and use `--torch_compile`."
            )
        configure_sharding(self.accelerator, supports_deepspeed)
        if main:
            for name, reason in options.unused_settings(recipe.max_train_steps).items():
                logger.warning("`%s` = %s has no effect: %s.", name, getattr(options, name), reason)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self.output_dir) if main else None
        self._upload = None
        if options.push_to_hub and main:
            name = options.hub_model_id or self.output_dir.resolve().name
            self._upload = HubUpload(name, self.output_dir, private=options.hub_private_repo)

    def begin(
        self,
        identity: Mapping[str, Any],
        *,
        models: Mapping[str, ModelMixin],
        ema: Mapping[str, EMAModel],
        modules: Mapping[str, torch.nn.Module],
        optimizers: Iterable[Any],
    ) -> int:
        """
        Continue where an earlier run with the same settings stopped, or begin.

        Args:
            identity (`Mapping[str, Any]`): What determines the run besides its recipe and seed; see [`Checkpointer`].
            models, ema, modules: What is trained and saved; see [`Checkpointer`].
            optimizers (`Iterable[AcceleratedOptimizer]`): All optimisers, as prepared.

        Returns:
            `int`: Steps done already.

        Raises:
            ValueError: If the checkpoint belongs to another run or lies beyond the last step, or the next one would
                not fit on the disk.
        """
        recipe, options = self.recipe, self.options
        self._averages = [(average, list(models[name].parameters())) for name, average in ema.items()]
        self._checkpointer = Checkpointer(
            self.accelerator,
            self.output_dir,
            {
                "recipe": dataclasses.asdict(recipe),
                "seed": options.seed,
                "mixed_precision": self.accelerator.mixed_precision,
            }
            | dict(identity),
            models=models,
            ema=ema,
            modules=modules,
            total_limit=options.checkpoints_total_limit,
        )
        resumed = self._checkpointer.load(options.resume_from_checkpoint)
        if resumed.step > recipe.max_train_steps:
            raise ValueError(
                f"`max_train_steps` is {recipe.max_train_steps}, but the run is at step {resumed.step} already: raise "
                "it, or choose another `output_dir`."
            )
        if resumed.step < recipe.max_train_steps:
            size = self._checkpointer.check_disk_space()
            if "TORCHELASTIC_RUN_ID" in os.environ and SHUTDOWN_TIMEOUT not in os.environ and size > 1e9:
                logger.info(
                    "A checkpoint has %.1f GB. When torch's launcher is told to stop, it kills the processes 30 s "
                    "later, whether it is saved by then or not: set %s=600 in its environment.",
                    size / 1e9,
                    SHUTDOWN_TIMEOUT,
                )
        self.extra = resumed.extra
        # a gradient scaler decides about the steps of the optimisers it serves
        unscaled = [optimizer.optimizer for optimizer in optimizers if optimizer.scaler is None]
        self._is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if self._is_deepspeed:
            unscaled = []
        self._guard = StepGuard(unscaled, options.max_skipped_steps, self.device)
        self._guard.load(resumed.extra.get("skipped_steps", 0))
        self._taken: torch.Tensor | None = None
        self.trackers = self._init_trackers(resumed.step)
        self.monitor = TrainingMonitor(
            self.output_dir,
            self.description,
            recipe.max_train_steps,
            resumed.step,
            reduce=self.average,
            enabled=self.accelerator.is_main_process,
            total_batch_size=recipe.total_batch_size,
        )
        self._stop = StopRequest()
        self._signal_number, self._diverged = 0, False
        self.seconds = resumed.training_seconds
        self._start = time.monotonic() - resumed.training_seconds
        return resumed.step

    def _init_trackers(self, first_step: int) -> Trackers:
        if self.options.report_to == "none":
            return Trackers([])
        kwargs, config = {}, None
        if self.accelerator.is_main_process:
            kwargs = tracker_init_kwargs(self.options.report_to, self.output_dir, first_step)
        if not complete_checkpoints(self.output_dir):  # TensorBoard would list a resumed run as a further one
            config = tracker_config(
                {"recipe": dataclasses.asdict(self.recipe), "options": dataclasses.asdict(self.options)}
            )
        project = self.options.tracker_project_name or "maetok_hf"
        self.accelerator.init_trackers(project, config=config, init_kwargs=kwargs)
        return Trackers(self.accelerator.trackers)

    def sum(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, on the CPU."""
        return self.accelerator.reduce(counts.to(self.device)).cpu()

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        return self.accelerator.reduce(values, reduction="mean")

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of a loss; one that is not finite will stop the step on all processes."""
        self.accelerator.backward(StepGuard.expose(loss))

    def admit(self, gradient_norms: Mapping[str, torch.Tensor]) -> None:
        """
        Decide whether the step is taken: only if all gradients are finite. Call it once a step, before the optimisers.

        Args:
            gradient_norms (`Mapping[str, torch.Tensor]`): Norms by the name under which they are reported.

        Raises:
            FloatingPointError: If one is not finite under DeepSpeed, which cannot skip a step.
        """
        norms = {name: full_tensor(torch.as_tensor(norm, device=self.device)) for name, norm in gradient_norms.items()}
        if self._is_deepspeed and not all(norm.isfinite() for norm in norms.values()):
            raise FloatingPointError(
                "A gradient is not finite, and DeepSpeed has taken the step already: the weights are lost, the last "
                "checkpoint is as it was. Lower the learning rate, or launch with "
                "examples/accelerate_configs/ddp.yaml or fsdp2.yaml, where such steps are skipped."
            )
        self._taken = self._guard.admit(norms.values())
        self.monitor.add(norms)

    def end_step(self, step: int, values: Mapping[str, float]) -> bool:
        """
        Update the moving averages, report, and look for reasons to stop.

        Args:
            step (`int`): The step that is over, counted from 0.
            values (`Mapping[str, float]`): What to report besides the terms, such as the learning rate.

        Returns:
            `bool`: Whether a checkpoint is due.
        """
        for average, parameters in self._averages:
            average.step(parameters)
        self.monitor.advance(self._taken)
        done = step + 1
        self._diverged, self._signal_number = self._guard.exhausted(), self._stop.agreed()
        save = bool(self._signal_number) or self._diverged
        save = save or done % self.options.checkpointing_steps == 0 or done == self.recipe.max_train_steps
        if save or done % self.options.logging_steps == 0:
            self.seconds = time.monotonic() - self._start
            entry = self.monitor.report(done, dict(values) | {"seconds": self.seconds})
            self.trackers.log(entry, done)
        return save

    @property
    def stopping(self) -> bool:
        """`bool`: Whether a signal asks the run to end. Whoever has sent it will not wait for much longer than it
        takes to save a checkpoint."""
        return bool(self._signal_number)

    @property
    def leaving(self) -> bool:
        """`bool`: Whether [`~TrainingRun.leave_if_asked`] will end the process."""
        return self.stopping or self._diverged

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint after `step` steps."""
        return self.output_dir / f"checkpoint-{step}"

    def save(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """
        Save a checkpoint.

        Args:
            step (`int`): The step that is over, counted from 0.
            extra (`Mapping[str, Any]`, *optional*): See [`~Checkpointer.save`].

        Raises:
            CheckpointError: If it could not be written.
        """
        extra = {"skipped_steps": self._guard.num_skipped} | dict(extra or {})
        self._checkpointer.save(step + 1, self.seconds, extra)

    def add_to_configs(self, step: int, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to the configs in the checkpoint after `step` steps; see [`~Checkpointer.add_to_configs`]."""
        self._checkpointer.add_to_configs(step, configs)

    def publish(self, write: Callable[[], Mapping[str, str | Path]], step: int) -> None:
        """
        Upload files in the background if the run does that. Whatever fails is a warning.

        Args:
            write (`Callable[[], Mapping[str, str | Path]]`): Makes what is to be uploaded, and returns the files by
                their names in the repository. It is called on the main process only, and only if there is an upload.
            step (`int`): Steps done, for the message.
        """
        if self._upload is None:
            return
        try:
            self._upload.start(write(), f"Step {step}")
        except Exception as error:
            logger.warning("Step %d is not uploaded, training goes on: %s: %s", step, type(error).__name__, error)

    @property
    def repo_id(self) -> str:
        """`str`: The Hub repository of the upload, on the main process; of a run without one what it would be by
        default."""
        return self.output_dir.resolve().name if self._upload is None else self._upload.repo_id

    def leave_if_asked(self, step: int) -> None:
        """
        End the process after a stop signal or too many skipped steps; the checkpoint of the step is saved by then.

        Raises:
            SystemExit: With 128 and the number of the signal.
            FloatingPointError: If too many steps in a row were skipped.
        """
        if self._diverged:
            raise FloatingPointError(
                f"At least {self.options.max_skipped_steps} steps in a row had a loss or gradient that is not finite, "
                f"up to step {step + 1}. They were skipped: checkpoint-{step + 1} has the weights from before them. "
                "Lower the learning rate, or use mixed precision bf16 instead of fp16."
            )
        if self._signal_number:
            self.accelerator.print(
                f"Stopped by signal {self._signal_number} after step {step + 1}: the same command continues, with "
                "`--resume_from_checkpoint latest`, which is the default."
            )
            self.close(UPLOAD_TIMEOUT_AFTER_SIGNAL)
            raise SystemExit(128 + self._signal_number)

    def end(self) -> None:
        """The last step is done: signals have their former effect again, since there is nothing left to save."""
        self._stop.release()
        self.monitor.close()

    def report(self) -> dict[str, Any]:
        """What the run was and how it went, in plain types."""
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "options": dataclasses.asdict(self.options),
            "num_processes": self.accelerator.num_processes,
            "num_threads": torch.get_num_threads(),
            "device": str(self.device),
            "mixed_precision": self.accelerator.mixed_precision,
            "training_seconds": self.seconds,
            "images_per_second": self.recipe.max_train_steps * self.recipe.total_batch_size / self.seconds,
            "skipped_steps": self._guard.num_skipped,
            "final": self.monitor.last_entry(),
        }

    def close(self, upload_timeout: float = UPLOAD_TIMEOUT) -> None:
        """
        Let uploads and trackers end, and the next run into the folder.

        Args:
            upload_timeout (`float`, *optional*, defaults to 900): Seconds that an upload gets.
        """
        if self._upload is not None:
            self._upload.finish(upload_timeout)
        self.trackers.close()
        if self._lock is not None:
            self._lock.release()
        self.accelerator.end_training()
