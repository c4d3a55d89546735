"""The protocol of a set: how it was sampled, recorded beside it, and compared before a set is continued."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from ..pipelines import MAETokDiffusionPipeline
from ..pipelines.guidance import resolve_guidance
from ..schedulers import FlowMatchEulerMaruyamaScheduler, FlowMatchHeunScheduler
from ..training.checkpointing import model_digest, write_json
from ..training.resumption import check_identity
from .npz import npz_size
from .options import GenerateOptions


logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
# of the raw size; photographs rarely become smaller than that as PNG files
SMALL_PNG = 0.5
LIBRARIES = ("maetok_hf", "torch", "diffusers", "accelerate", "numpy", "pillow")


def make_scheduler(name: str, pipe: MAETokDiffusionPipeline) -> SchedulerMixin:
    """
    A solver for a pipeline, with the time shift of the one that it has.

    Args:
        name (`str`): `"euler-maruyama"`, `"euler"`, `"heun"`, `"unipc"` or `"dpm-solver++"`.
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.

    Returns:
        [`SchedulerMixin`]: The solver.

    Raises:
        ValueError: If the name is none of these.
    """
    config = pipe.scheduler.config
    shift = config.get("shift", config.get("flow_shift", 1.0))
    flow_mode = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    match name:
        case "euler-maruyama":
            return FlowMatchEulerMaruyamaScheduler(shift=shift, path=pipe.transformer.config.path)
        case "euler":
            return FlowMatchEulerDiscreteScheduler(shift=shift)
        case "heun":
            return FlowMatchHeunScheduler(shift=shift)
        case "unipc":
            return UniPCMultistepScheduler(**flow_mode)
        case "dpm-solver++":
            return DPMSolverMultistepScheduler(**flow_mode)
    raise ValueError(
        f"`scheduler` must be 'euler-maruyama', 'euler', 'heun', 'unipc' or 'dpm-solver++', got {name!r}."
    )


def resolve_sampling(
    options: GenerateOptions, pipe: MAETokDiffusionPipeline, classes: Sequence[int]
) -> dict[str, Any]:
    """
    The arguments of every call of the pipeline, checked as the call would check them.

    Args:
        options ([`GenerateOptions`]): What is asked for.
        pipe ([`MAETokDiffusionPipeline`]): The pipeline, with the scheduler that it will sample with.
        classes (`Sequence[int]`): Classes of the set.

    Returns:
        `dict[str, Any]`: Steps, and method, scale and interval of guidance.

    Raises:
        ValueError: If an argument is out of range or has no effect, or the pipeline lacks what it needs.
    """
    method, scale = resolve_guidance(
        options.guidance_method,
        options.guidance_scale,
        options.guidance_temperature,
        pipe.transformer,
        pipe.guidance_transformer,
        default_scale=pipe.config.default_guidance_scale,
    )
    if options.guidance_transformer_name_or_path is not None and (method != "autoguidance" or scale == 1):
        raise ValueError(
            f"`guidance_transformer_name_or_path` has no effect with `guidance_method` {method!r} at scale {scale}: "
            "add `--guidance_method autoguidance` and a `--guidance_scale` other than 1, or remove it."
        )
    if scale == 1 and options.guidance_interval is not None:
        raise ValueError(
            f"`guidance_interval` = {options.guidance_interval} has no effect at scale 1, which is no guidance: "
            "remove it."
        )
    if options.label_draw == "random" and len(classes) == 1:
        raise ValueError("`label_draw` = 'random' has no effect with one class: remove it.")
    interval = tuple(options.guidance_interval or pipe.config.default_guidance_interval)
    num_inference_steps = options.num_inference_steps or pipe.config.default_num_inference_steps
    pipe.check_inputs(
        labels=list(classes),
        guidance_interval=interval,
        num_inference_steps=num_inference_steps,
        num_images_per_label=1,
        generator=None,
        latents=None,
        output_type="pt",  # not "latent": the latents' statistics are needed
        sigmas=None,
        callback_on_step_end_tensor_inputs=[],
    )
    return {
        "num_inference_steps": num_inference_steps,
        "guidance_method": method,
        "guidance_scale": scale,
        "guidance_interval": interval,
    }


def image_shape(pipe: MAETokDiffusionPipeline) -> tuple[int, int, int]:
    """Height, width and channels of an 8-bit image of a pipeline."""
    return pipe.vae.config.sample_size, pipe.vae.config.sample_size, 3


def sampling_settings(
    options: GenerateOptions,
    pipe: MAETokDiffusionPipeline,
    classes: Sequence[int],
    sampling: Mapping[str, Any],
    digests: dict[str, str] | None = None,
) -> dict[str, Any]:
    """
    What determines the images of a set, up to the last bits of their computation.

    Args:
        options ([`GenerateOptions`]): What is asked for.
        pipe ([`MAETokDiffusionPipeline`]): The pipeline; its weights are read, and named by a digest.
        classes (`Sequence[int]`): Classes of the set.
        sampling (`Mapping[str, Any]`): From [`resolve_sampling`].
        digests (`dict[str, str]`, *optional*): Digests of the pipeline's components that are known, by name; those
            that are read are added, so that sets of one pipeline share them.

    Returns:
        `dict[str, Any]`: Plain types, for a JSON file.
    """
    digests = {} if digests is None else digests
    num_classes = pipe.transformer.config.num_classes
    guided = sampling["guidance_scale"] != 1
    models = ["vae", "transformer"]
    models += ["guidance_transformer"] if guided and sampling["guidance_method"] == "autoguidance" else []
    for name in models:
        if name not in digests:
            digests[name] = model_digest(getattr(pipe, name))
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    # in low precision the rounding of matrix products, which depends on it, is more than the last bits
    batch_size = {} if options.dtype == "float32" else {"batch_size": options.batch_size}
    return {
        "num_images": options.num_images,
        "resolution": list(image_shape(pipe)[:2]),
        "num_classes": num_classes,
        "class_labels": "all" if list(classes) == list(range(num_classes)) else list(classes),
        "label_draw": options.label_draw,
        "seed": options.seed,
        "scheduler": {"name": type(pipe.scheduler).__name__, **config},
        "num_inference_steps": sampling["num_inference_steps"],
        "guidance_method": sampling["guidance_method"] if guided else "none",
        "guidance_scale": sampling["guidance_scale"],
        "guidance_interval": list(sampling["guidance_interval"]) if guided else None,
        "dtype": options.dtype,
        "rounding": options.rounding,
        **batch_size,
        "digests": {name: digests[name] for name in models},
    }


def run_settings(options: GenerateOptions, num_processes: int, device: torch.device) -> dict[str, Any]:
    """
    Where and with what a set was made, which may change the last bits of an image and nothing else.

    Args:
        options ([`GenerateOptions`]): What is asked for.
        num_processes (`int`): Processes.
        device (`torch.device`): Device of the first one.

    Returns:
        `dict[str, Any]`: Plain types, for a JSON file.
    """
    return {
        "pretrained_model_name_or_path": options.pretrained_model_name_or_path,
        "revision": options.revision,
        "batch_size": options.batch_size,
        "num_processes": num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "num_threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def record_settings(output_dir: str | Path, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """
    Write `settings.json` before the first image, or compare it with the one that is there.

    Its `settings` never change. Its `runs` has an entry for every environment in which images were made; another one
    than before is allowed, with a warning.

    Args:
        output_dir (`str` or `Path`): Folder of the set.
        settings (`Mapping[str, Any]`): From [`sampling_settings`].
        run (`Mapping[str, Any]`): From [`run_settings`].

    Raises:
        ValueError: If the folder holds a set of other settings, which are listed.
    """
    path = Path(output_dir) / SETTINGS_FILE
    settings, run, runs = dict(settings), dict(run), []
    if path.is_file():
        recorded = json.loads(path.read_text(encoding="utf-8"))
        check_identity(path, recorded["settings"], json.loads(json.dumps(settings)))
        settings, runs = recorded["settings"], recorded["runs"]
    if run in runs:
        return
    if runs:
        matters = ("batch_size", "device", "num_threads", "float32_matmul_precision", "versions")
        changed = [name for name in matters if run[name] != runs[-1][name]]
        if changed:
            logger.warning(
                "%s has another value than when this set was begun: images made now may differ in the last bits from "
                "those that would have been made then.",
                ", ".join(changed),
            )
    write_json(path, {"settings": settings, "runs": [*runs, run]})


def check_free_space(output_dir: str | Path, shape: Sequence[int], num_missing: int, with_npz: bool) -> None:
    """
    Refuse a disk that cannot hold the `.npz` file, before any work, and warn of one that will hardly hold the set.

    Args:
        output_dir (`str` or `Path`): Folder of the set.
        shape (`Sequence[int]`): Images, height, width, 3.
        num_missing (`int`): Images that are still to be written, as PNG files.
        with_npz (`bool`): Whether the `.npz` file is still to be written, from the PNG files.

    Raises:
        ValueError: If there is less room than the `.npz` file alone needs.
    """
    size = npz_size(shape) if with_npz else 0
    files = int(SMALL_PNG * npz_size(shape) * num_missing / shape[0])
    free = shutil.disk_usage(output_dir).free
    if free < size:
        raise ValueError(
            f"`output_dir` {output_dir} has {free / 1e9:.2f} GB free, but the .npz file takes {size / 1e9:.2f} GB: "
            "make room, or choose a folder on another disk."
        )
    if free < size + files:
        logger.warning(
            "%s has %.2f GB free, but the PNG files take about %.2f GB%s: make room while they are written.",
            output_dir,
            free / 1e9,
            files / 1e9,
            f" besides the {size / 1e9:.2f} GB of the .npz file" if with_npz else "",
        )
