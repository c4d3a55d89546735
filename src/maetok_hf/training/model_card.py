"""The README of a trained model on the Hub: recipe, data, what was measured, how to load it."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .tracking import tracker_config


METRIC_LABELS = {"psnr": "PSNR in dB", "ssim": "SSIM", "lpips": "LPIPS"}


def write_model_card(
    folder: str | Path,
    template_path: str | Path,
    *,
    repo_id: str,
    recipe: Mapping[str, Any],
    step: int,
    model_config: Mapping[str, Any],
    dataset_name: str,
    train_split: str,
    base_model: str | None = None,
    continued_from: str | None = None,
    validation_split: str | None = None,
    metrics: Mapping[str, float] | None = None,
    protocol: str | None = None,
    picture: str | None = None,
    license: str = "apache-2.0",
) -> Path:
    """
    Write `README.md` from a template of `model_cards`, whole or not at all.

    Data sets and models in local folders are named by the folder, without its path, and are no part of the metadata.

    Args:
        folder (`str` or `Path`):
            Where the card is put.
        template_path (`str` or `Path`):
            Jinja template, whose metadata block has `pipeline_tag`; it gets the arguments below.
        repo_id (`str`):
            Repository, for the lines that load the model.
        recipe (`Mapping[str, Any]`):
            The recipe as nested plain values; it is shown as a table, and has `max_train_steps` and
            `total_batch_size`.
        step (`int`):
            Steps done.
        model_config (`Mapping[str, Any]`):
            Config of the trained model.
        dataset_name (`str`):
            The data set, as `datasets.load_dataset` takes it.
        train_split (`str`):
            Its split that was trained on.
        base_model (`str`, *optional*):
            Name or path of the model that the training began from, or whose latents it used.
        continued_from (`str`, *optional*):
            Name or path of the model whose training was continued, where that is not `base_model`.
        validation_split (`str`, *optional*):
            Split on which `metrics` were measured.
        metrics (`Mapping[str, float]`, *optional*):
            What was measured, with `num_images`. Only these become evaluation results of the metadata.
        protocol (`str`, *optional*):
            How that was measured; by default what the template says of its usual metrics.
        picture (`str`, *optional*):
            A picture, by its path in the repository.
        license (`str`, *optional*, defaults to `"apache-2.0"`):
            Licence of the weights, by its identifier on the Hub.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: If the template's metadata is not valid.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    hub_dataset = dataset_name if is_on_hub(dataset_name) else None
    hub_base_model = base_model if base_model is not None and is_on_hub(base_model) else None
    measured = {name: value for name, value in (metrics or {}).items() if value is not None and math.isfinite(value)}
    num_images = measured.pop("num_images", None)
    card = ModelCard.from_template(
        ModelCardData(license=license, base_model=hub_base_model, datasets=[hub_dataset] if hub_dataset else None),
        template_path=str(template_path),
        model_name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        recipe={name: _table_cell(value) for name, value in tracker_config(recipe).items()},
        step=step,
        max_train_steps=recipe["max_train_steps"],
        total_batch_size=recipe["total_batch_size"],
        config=model_config,
        dataset=public_name(dataset_name),
        dataset_is_on_hub=hub_dataset is not None,
        train_split=train_split,
        base_model=base_model and public_name(base_model),
        base_model_is_on_hub=hub_base_model is not None,
        continued_from=continued_from and public_name(continued_from),
        validation_split=validation_split,
        metrics={METRIC_LABELS.get(name, name): f"{value:.4g}" for name, value in measured.items()},
        num_images=num_images,
        protocol=protocol,
        picture=picture,
    )
    if measured:
        card.data.model_name = repo_id.rsplit("/", 1)[-1]
        card.data.eval_results = [
            EvalResult(
                task_type=card.data.pipeline_tag,
                dataset_type=dataset_name if hub_dataset else "local",
                dataset_name=public_name(dataset_name),
                dataset_split=validation_split,
                metric_type=name,
                metric_name=METRIC_LABELS.get(name, name),
                metric_value=value,
            )
            for name, value in measured.items()
        ]
    path = Path(folder) / "README.md"
    temporary = path.with_name(".README.md.tmp")
    ModelCard(str(card)).save(temporary)  # parsed once more: what was added is valid, too
    os.replace(temporary, path)
    return path


def is_on_hub(name: str) -> bool:
    """Whether the name of a model or data set can be that of a repository: it is no local folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if "/" not in name or name[0] in "./" or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def public_name(name: str) -> str:
    """Name of a model or data set for others to see: of a local folder the last part of its path."""
    return name if is_on_hub(name) else Path(name).name


def _table_cell(value: str | int | float | bool) -> str:
    """Without what ends a cell, and of paths on this machine only the last part."""
    text = re.sub(r"(^|:)(/[^/\s]+)*/([^/\s]+)/?$", r"\1\3", str(value))
    return text.replace("|", "\\|")
