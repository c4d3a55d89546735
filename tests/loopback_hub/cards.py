"""What the Hub demands of the metadata of a card."""

from typing import Any

import yaml


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
