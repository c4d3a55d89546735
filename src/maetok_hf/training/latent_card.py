"""The README of a cache of latents on the Hub: what is in it, where it comes from, how to load it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .model_card import is_on_hub


_SIZE_CATEGORIES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
    1_000_000_000: "100M<n<1B",
}


def _size_category(num_rows: int) -> str:
    return next((name for limit, name in _SIZE_CATEGORIES.items() if num_rows < limit), "n>1B")


def write_latents_card(
    folder: str | Path, template_path: str | Path, *, repo_id: str, metadata: Mapping[str, Any]
) -> Path:
    """
    Write `README.md` from a template of `model_cards`, whole or not at all.

    Args:
        folder (`str` or `Path`): The cache.
        template_path (`str` or `Path`): Jinja template with a metadata block.
        repo_id (`str`): Repository or folder, for the lines that load the latents.
        metadata (`Mapping[str, Any]`): What `latents.json` says.

    Returns:
        `Path`: The card.

    Raises:
        ValueError: If the template's metadata is not valid.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    dataset, tokenizer, split = metadata["dataset"], metadata["tokenizer"], metadata["split"]
    configs = [{"config_name": "default", "data_files": [{"split": split, "path": f"data/{split}-*.parquet"}]}]
    card = DatasetCard.from_template(
        DatasetCardData(
            task_categories=["unconditional-image-generation"],
            size_categories=[_size_category(metadata["num_rows"])],
            source_datasets=[dataset["name"]] if is_on_hub(dataset["name"]) else None,
            configs=configs,
        ),
        template_path=str(template_path),
        pretty_name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        metadata=metadata,
        scalar=metadata["statistics"]["scalar"],
        dataset_is_on_hub=is_on_hub(dataset["name"]),
        tokenizer_is_on_hub=is_on_hub(tokenizer["name_or_path"]),
        alignment_is_on_hub="alignment" in metadata and is_on_hub(metadata["alignment"]["model"]),
        counts={name: count for name, count in metadata["counts"].items() if count},
    )
    path = Path(folder) / "README.md"
    temporary = path.with_name(".README.md.tmp")
    DatasetCard(str(card)).save(temporary)  # parsed once more: what was filled in is valid, too
    os.replace(temporary, path)
    return path
