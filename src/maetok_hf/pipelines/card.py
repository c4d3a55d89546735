"""What the README of a pushed pipeline says of it."""

import json
from typing import Any

from diffusers import DiffusionPipeline

from ..models.model_card import describe_size


SHOWN_CLASSES = 10
_CODE = """\
import torch
from maetok_hf import MAETokDiffusionPipeline

pipe = MAETokDiffusionPipeline.from_pretrained("{repo_id}")
image = pipe(class_labels={label}, generator=torch.Generator().manual_seed(0)).images[0]"""


def card_facts(pipe: DiffusionPipeline, repo_id: str) -> dict[str, Any]:
    """
    Describe a pipeline.

    Args:
        pipe ([`MAETokDiffusionPipeline`]): The pipeline.
        repo_id (`str`): Repository, for the lines that load it.

    Returns:
        `dict[str, Any]`: For [`~models.model_card.make_model_card`].
    """
    num_classes = pipe.transformer.config.num_classes
    names = pipe.config.id2label or {}
    return {
        "summary": (
            "A pipeline (`MAETokDiffusionPipeline`) that generates images of a class: a diffusion transformer "
            f"(`{type(pipe.transformer).__name__}`) makes latents, which a one-dimensional image tokenizer "
            f"(`{type(pipe.vae).__name__}`) decodes to {pipe.vae.config.sample_size} pixels."
        ),
        "code": _CODE.format(repo_id=repo_id, label=_first_label(names)),
        "settings": _settings(pipe, num_classes, names),
        "limits": [
            f"It generates the {num_classes} classes that it was trained on, and nothing that a text could ask for.",
            "Details are no finer than the tokenizer's reconstructions.",
            "It reproduces the biases of the training data, and may reproduce single images of small data sets.",
        ],
        "tags": ["class-conditional-image-generation"],
        "pipeline_tag": "unconditional-image-generation",
    }


def _first_label(names: dict[int, str]) -> str:
    return json.dumps(names[min(names)].split(",")[0], ensure_ascii=False) if names else "0"


def _settings(pipe: DiffusionPipeline, num_classes: int, names: dict[int, str]) -> dict[str, Any]:
    tokens, channels = pipe.transformer.config.sample_size, pipe.transformer.config.in_channels
    shown = [names[index] for index in sorted(names)[:SHOWN_CLASSES]]
    classes = f": {'; '.join(shown)}{'; ...' if len(names) > len(shown) else ''}" if shown else ""
    settings: dict[str, Any] = {
        "vae": f"{type(pipe.vae).__name__}, {describe_size(pipe.vae)}",
        "latents": f"{tokens} tokens of {channels} channels",
        "transformer": f"{type(pipe.transformer).__name__}, {describe_size(pipe.transformer)}",
        "scheduler": type(pipe.scheduler).__name__,
        "classes": f"{num_classes}{classes}",
    }
    weak = pipe.guidance_transformer
    if weak is not None:
        settings["guidance_transformer"] = f"{type(weak).__name__}, {describe_size(weak)}"
    # steps and guidance of calls that give none
    defaults = {name: value for name, value in pipe.config.items() if name.startswith("default_")}
    return settings | {name: value for name, value in defaults.items() if value is not None}
