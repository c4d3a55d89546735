"""What the Hub demands of the metadata of a card, and the check of a card by huggingface_hub's own classes."""

from typing import Any

import yaml


def check_card(repo_id: str, repo_type: str = "model") -> Any:
    """
    Load a card from the Hub and make sure that its metadata is valid and says the same after a round trip.

    Returns:
        `ModelCard` or `DatasetCard`: The card.
    """
    from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
    from huggingface_hub.utils import validate_repo_id

    card_class, data_class = {"model": (ModelCard, ModelCardData), "dataset": (DatasetCard, DatasetCardData)}[
        repo_type
    ]
    card = card_class.load(repo_id)
    card.validate(repo_type=repo_type)
    block = yaml.safe_load(card.content.removeprefix("---\n").partition("\n---")[0])
    assert data_class(**block).to_dict() == card.data.to_dict() == block
    for name in ("base_model", "datasets", "source_datasets"):
        named = block.get(name, [])
        for one in named if isinstance(named, list) else [named]:
            validate_repo_id(one)
            assert "/" in one
    if "model-index" in block:
        name, results = model_index_to_eval_results(block["model-index"])
        assert name == repo_id.split("/")[-1] and results == card.data.eval_results
        assert eval_results_to_model_index(name, results) == block["model-index"]
    assert "{{" not in card.text and "{%" not in card.text and "TODO" not in card.text
    return card


def errors_in(content: str) -> list[str]:
    """What is wrong with the metadata block of a README."""
    if not content.startswith("---\n"):
        return []
    block, found, _ = content.removeprefix("---\n").partition("\n---")
    if not found:
        return ["the metadata block has no end"]
    try:
        metadata = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"the metadata is no YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata is no mapping"]
    errors = [
        f'"{name}" must be a string or a list of them'
        for name in ("license", "library_name", "pipeline_tag", "tags", "datasets", "base_model", "language")
        if not _are_texts(metadata.get(name, []))
    ]
    index = metadata.get("model-index", [])
    if not isinstance(index, list):
        return [*errors, '"model-index" must be an array']
    for number, model in enumerate(index):
        errors += _errors_of_model(f"model-index[{number}]", model)
    return errors


def _are_texts(value: Any) -> bool:
    return all(isinstance(one, str) for one in (value if isinstance(value, list) else [value]))


def _errors_of_model(where: str, model: Any) -> list[str]:
    errors = [] if model.get("name") else [f'"{where}.name" is required']
    if not model.get("results"):
        return [*errors, f'"{where}.results" is required']
    for number, result in enumerate(model["results"]):
        place = f"{where}.results[{number}]"
        for name in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
            value = result.get(name[0], {}).get(name[1])
            if not isinstance(value, str) or not value:
                errors.append(f'"{place}.{".".join(name)}" must be a string')
        if not result.get("metrics"):
            errors.append(f'"{place}.metrics" is required')
        for metric in result.get("metrics") or []:
            if not metric.get("type") or "value" not in metric:
                errors.append(f'"{place}.metrics" need a type and a value')
    return errors
