"""The pipeline that a set is sampled from."""

from pathlib import Path

import torch
from diffusers import AutoModel

from ..pipelines import MAETokDiffusionPipeline
from .options import SamplingOptions
from .protocol import make_scheduler


def load_pipeline(options: SamplingOptions, device: torch.device) -> MAETokDiffusionPipeline:
    """
    The pipeline that options ask for, with its scheduler.

    Args:
        options ([`SamplingOptions`]): What is asked for.
        device (`torch.device`): Where it shall be.

    Returns:
        [`MAETokDiffusionPipeline`]: Without a progress bar.

    Raises:
        ValueError: If a revision is asked of a local folder.
    """
    dtype, components = getattr(torch, options.dtype), {}
    if options.revision is not None and Path(options.pretrained_model_name_or_path).is_dir():
        raise ValueError(f"`revision` = {options.revision!r} has no meaning for a local folder: remove it.")
    if options.guidance_transformer_name_or_path is not None:
        weak = AutoModel.from_pretrained(options.guidance_transformer_name_or_path, dtype=dtype)
        components = {"guidance_transformer": weak}
    pipe = MAETokDiffusionPipeline.from_pretrained(
        options.pretrained_model_name_or_path, revision=options.revision, dtype=dtype, **components
    )
    pipe.set_progress_bar_config(disable=True)
    if options.scheduler is not None:
        pipe.scheduler = make_scheduler(options.scheduler, pipe)
    return pipe.to(device)
