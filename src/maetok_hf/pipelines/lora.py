"""LoRA adapters in a pipeline: which classes a data set has in common with it, and how an adapter gets into it.

An adapter that `examples/train_sit_lora.py` has trained may add classes to the transformer's class table. Once it is
loaded, it is handled by the methods of the transformer that diffusers gives to every model:

```python
name = load_lora_into(pipe, "user/adapter")
pipe.transformer.set_adapters(name, 0.7)  # its strength
pipe.transformer.fuse_lora()  # into the weights, `unfuse_lora` takes it out again
pipe.transformer.delete_adapters(name)  # or `unload_lora`, for all of them
```
"""

import difflib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from diffusers.models.model_loading_utils import load_state_dict
from diffusers.utils.hub_utils import _get_model_file
from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

from ..models.lora import LoraInfo
from .labels import check_id2label, classes_by_name, find_class
from .pipeline_maetok import MAETokDiffusionPipeline


# the name that `save_lora_adapter` gives to its file
WEIGHT_NAME = "pytorch_lora_weights.safetensors"


class ClassMatch(NamedTuple):
    """
    The classes of a data set in a model.

    Attributes:
        labels (`list[int]`): Class of the model for every class of the data set, in its order.
        new_names (`list[str]`): Names that the model lacks. Their classes follow its last one, in this order.
        similar (`dict[str, str]`): New names that resemble one of the model's, and may be misspelt.
    """

    labels: list[int]
    new_names: list[str]
    similar: dict[str, str]


def match_classes(names: Sequence[str] | None, id2label: Mapping[int, str] | None, num_classes: int) -> ClassMatch:
    """
    Find the classes of a data set among those of a model, by their names.

    Args:
        names (`Sequence[str]`): Names of the data set's classes; each may be a name or a synonym of `id2label`.
        id2label (`dict[int, str]`): Names of the model's classes.
        num_classes (`int`): Classes of the model.

    Returns:
        [`ClassMatch`]: Where they are, and which are new.

    Raises:
        ValueError: If either side has no names, or a name is borne by several classes.
    """
    if not names:
        raise ValueError(
            "the data set does not name its classes: use a folder with one folder of images per class, or a label "
            "column of `datasets.ClassLabel`."
        )
    if not id2label:
        raise ValueError(
            "the pipeline has no `id2label`, by which the data set's class names could be found: give it names, "
            "`MAETokDiffusionPipeline(..., id2label={0: 'tench'})`, and save it."
        )
    classes = classes_by_name(id2label)
    labels, new_names, similar = [], [], {}
    for name in map(str.strip, names):
        if name in classes:
            labels.append(find_class(name, classes))
            continue
        labels.append(num_classes + len(new_names))
        new_names.append(name)
        for hint in difflib.get_close_matches(name, classes, n=1, cutoff=0.8):
            similar[name] = hint
    return ClassMatch(labels, new_names, similar)


def add_named_classes(pipeline: MAETokDiffusionPipeline, names: Sequence[str]) -> None:
    """
    Enlarge the class table of a pipeline's transformer, and of its guidance transformer if it has one; see
    [`~SiTTransformer1DModel.add_classes`]. Adapters of the table are added afterwards.

    Args:
        pipeline ([`MAETokDiffusionPipeline`]): Changed in place; `id2label` gets the names.
        names (`Sequence[str]`): Names of the new classes. None of them changes nothing.
    """
    if not names:
        return
    first = pipeline.transformer.config.num_classes
    for transformer in (pipeline.transformer, pipeline.guidance_transformer):
        if transformer is not None:
            transformer.add_classes(len(names))
    added = dict(enumerate(names, start=first))
    pipeline.register_to_config(id2label=check_id2label(pipeline.config.id2label or {}) | added)


def load_lora_into(
    pipeline: MAETokDiffusionPipeline,
    source: str | os.PathLike,
    adapter_name: str | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> str:
    """
    Load an adapter of `examples/train_sit_lora.py` into the transformer of a pipeline, which first gets the classes
    that the adapter adds. They stay when the adapter is unloaded: without it they are the mean of the others.

    Args:
        pipeline ([`MAETokDiffusionPipeline`]): The pipeline that was fine-tuned, or one with a transformer of the same
            sizes and classes; changed in place. It may have other adapters.
        source (`str` or `os.PathLike`): Folder or Hub repository of the adapter, or a checkpoint's `adapter_ema`.
        adapter_name (`str`, *optional*): Name for `set_adapters`, `delete_adapters` and the like; by default
            `"default_0"` and so on.
        subfolder (`str`, *optional*): Where the adapter is inside `source`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): Token for private repositories; by default the one of `hf auth login`.
        cache_dir (`str` or `os.PathLike`, *optional*): Where downloads are kept.
        local_files_only (`bool`, *optional*, defaults to `False`): Download nothing.

    Returns:
        `str`: The name of the adapter, which is the active one.

    Raises:
        OSError: If there is no adapter, or its weights cannot be read.
        ValueError: If the adapter belongs to a transformer of other sizes or classes, its weights are not those of an
            adapter, or the name is taken. In all of these cases the pipeline is as it was.
    """
    transformer = pipeline.transformer
    place = {
        "subfolder": subfolder,
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    info = LoraInfo.load_config(source, **place)
    taken = getattr(transformer, "peft_config", {})
    if adapter_name in taken:
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, but the transformer has {sorted(taken)}: choose another."
        )
    new_names = _missing_classes(pipeline, info, str(source))
    # damaged weights must be known before anything changes
    file = _get_model_file(source, weights_name=WEIGHT_NAME, **place)
    weights, metadata = load_state_dict(file), _load_sft_state_dict_metadata(file)
    _check_weights(weights, transformer, len(new_names), str(source))
    if adapter_name is None:
        adapter_name = next(name for i in itertools.count() if (name := f"default_{i}") not in taken)
    add_named_classes(pipeline, new_names)
    transformer.load_lora_adapter(
        weights, prefix=None, adapter_name=adapter_name, metadata=metadata, _pipeline=pipeline
    )
    transformer.set_adapters(adapter_name)
    return adapter_name


def _missing_classes(pipeline: MAETokDiffusionPipeline, info: Mapping[str, Any], source: str) -> list[str]:
    """Names that the pipeline lacks for an adapter; that it is an adapter for this pipeline is checked."""
    transformer = pipeline.transformer
    sizes = LoraInfo.sizes_of(transformer)
    if sizes != info["transformer"]:
        raise ValueError(
            f"the adapter {source} belongs to {info['base_model']!r}, a {info['transformer']}, but the pipeline's "
            f"transformer is a {sizes}: load it into the pipeline it was trained on."
        )
    first, num_classes = info["num_base_classes"], transformer.config.num_classes
    theirs = check_id2label(info["id2label"])
    ours = check_id2label(pipeline.config.id2label) or {}
    added = [theirs[index] for index in sorted(theirs) if index >= first]
    differing = [index for index in theirs.keys() & ours.keys() if theirs[index] != ours[index]]
    if differing:
        index = min(differing)
        raise ValueError(
            f"class {index} is {theirs[index]!r} in the adapter {source} but {ours[index]!r} in the pipeline: load it "
            f"into {info['base_model']!r} anew, without an adapter that adds other classes."
        )
    if num_classes == first:
        return added
    known = all(index in ours for index in theirs if index >= first)
    if num_classes > first and known and (not added or num_classes == first + len(added)):
        return []
    raise ValueError(
        f"the adapter {source} belongs to a transformer of {first} classes"
        + (f" and adds {len(added)}" if added else "")
        + f", but the pipeline's has {num_classes}: load it into {info['base_model']!r} anew."
    )


def _check_weights(weights: Mapping[str, torch.Tensor], transformer: ModelMixin, num_new: int, source: str) -> None:
    """Refuse weights that are not the factors of layers of a transformer that gets new classes."""
    layers = dict(transformer.named_modules())
    factors: dict[str, dict[str, list[int]]] = {}
    for name, tensor in weights.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".lora_")
        factors.setdefault(layer, {})[factor.removeprefix("embedding_")] = list(tensor.shape)
    if not factors:
        raise ValueError(f"the adapter {source} has no weights: save or download it anew.")
    for name, shapes in factors.items():
        rank = shapes.get("A", [0])[0]
        expected = list(getattr(layers.get(name), "weight", torch.empty(0)).shape)
        if name == "class_embed":  # peft's factors are those of the transposed table
            expected = [expected[1], expected[0] + num_new]
        product = [*shapes.get("B", [])[:1], *shapes.get("A", [])[1:]]
        if product != expected or shapes["B"][1:] != [rank]:
            raise ValueError(
                f"the weights of the adapter {source} do not fit the layer {name!r} of the pipeline's transformer: "
                f"save or download the adapter anew, with the `{LoraInfo.config_name}` that belongs to it."
            )
