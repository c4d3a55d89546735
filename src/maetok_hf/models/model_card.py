"""The README that `push_to_hub` puts into a repository that has none."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin


TEMPLATE = Path(__file__).with_name("model_card_template.md")
README = "README.md"
LONGEST_LIST = 4  # of values that are shown one by one


class ModelCardMixin:
    """
    diffusers' `push_to_hub` and `save_pretrained(..., push_to_hub=True)`, with a README that says what was uploaded
    and how to use it where diffusers would put an empty form. A README that the repository has is kept.

    A subclass says what is particular to it in `_card_facts`.
    """

    def _card_facts(self, repo_id: str) -> dict[str, Any]:
        """For the template: `summary`, `code`, `limits` and `settings`, for the metadata `tags` and `pipeline_tag`."""
        raise NotImplementedError

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, token: str | None = None, **kwargs: Any):
        # diffusers writes a README for uploads to the root of a repository only
        path = Path(working_dir) / README
        if path.is_file():
            from huggingface_hub import HfApi

            if not HfApi(token=token).file_exists(repo_id, README):
                path.write_text(make_model_card(repo_id, **self._card_facts(repo_id)), encoding="utf-8")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)


def make_model_card(
    repo_id: str,
    *,
    summary: str,
    code: str,
    settings: Mapping[str, Any],
    limits: list[str],
    tags: list[str],
    pipeline_tag: str | None = None,
) -> str:
    """
    Fill the template.

    Args:
        repo_id (`str`): Repository.
        summary (`str`): What it is, in a sentence or two.
        code (`str`): Lines of Python that load and use it.
        settings (`Mapping[str, Any]`): What it consists of, shown as a table.
        limits (`list[str]`): What it cannot do.
        tags (`list[str]`): Tags of the repository, besides `maetok`.
        pipeline_tag (`str`, *optional*): Task of the repository.

    Returns:
        `str`: The card.

    Raises:
        ValueError: If its metadata is not valid.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(library_name="diffusers", pipeline_tag=pipeline_tag, tags=["maetok", *tags])
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=repo_id.rsplit("/", 1)[-1],
        summary=summary,
        code=code,
        settings={name: _cell(value) for name, value in settings.items()},
        limits=limits,
    )
    return str(card)


def config_settings(model: ConfigMixin) -> dict[str, Any]:
    """
    The settings of a model for its card.

    Args:
        model (`ModelMixin`): A model.

    Returns:
        `dict[str, Any]`: Its parameters and type, and the entries of its config that are set.
    """
    known = {name: value for name, value in model.config.items() if not name.startswith("_") and value is not None}
    return {"parameters": describe_size(model)} | known


def describe_size(model: torch.nn.Module) -> str:
    """
    How large a model is.

    Args:
        model (`ModelMixin`): A model.

    Returns:
        `str`: Number and type of its parameters.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e6:.1f} million" if count >= 1e5 else str(count)
    return f"{size}, {str(model.dtype).removeprefix('torch.')}"


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > LONGEST_LIST:
        return f"{len(value)} values"
    return str(value).replace("|", "\\|").replace("\n", " ")
