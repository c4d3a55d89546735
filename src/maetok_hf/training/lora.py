"""A LoRA adapter (arXiv 2106.09685) as a model of its own, so that it is averaged, saved and continued like any other.

The adapter's parameters live in the layers of the transformer that [peft](https://huggingface.co/docs/peft) wraps;
[`LoraAdapter`] holds the same parameters under the names they have in diffusers' adapter files, and is what a run
trains and saves: the transformer itself stays as it is and is in no checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..models.lora import LoraInfo
from ..seeding import keyed_seed
from .lora_recipe import LoraRecipe


# peft's name for the adapter in the layers of the transformer that is trained
ADAPTER_NAME = "default"


def add_lora(transformer: ModelMixin, recipe: LoraRecipe, with_class_table: bool, seed: int) -> None:
    """
    Freeze a transformer and give it an adapter, which changes nothing until it is trained.

    The class table is adapted by two factors of the recipe's rank: a row changes only if its class is trained on, and
    as many new classes as the rank can become anything.

    Args:
        transformer (`ModelMixin`): A generator with all of its classes, without an adapter; changed in place.
        recipe ([`LoraRecipe`]): Its rank, scale, dropout and layers.
        with_class_table (`bool`): Whether the class table is adapted.
        seed (`int`): Seed of the initialisation.

    Raises:
        ValueError: If the transformer has an adapter already, or lacks a layer.
    """
    from peft import LoraConfig

    if getattr(transformer, "peft_config", None):
        raise ValueError(
            f"the transformer has the adapters {sorted(transformer.peft_config)} already: fuse them "
            "(`fuse_lora`, `unload_lora`) and save the pipeline, or unload them."
        )
    layers = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    for layer in recipe.lora_layers:
        if not any(f".{name}".endswith(f".{layer}") for name in layers):
            known = sorted({name.split(".", 2)[-1] for name in layers if name.startswith("transformer_blocks.")})
            raise ValueError(
                f"`lora_layers` names {layer!r}, but no linear layer of the {type(transformer).__name__} has a name "
                f"that ends so; those of its blocks are {known}."
            )
    transformer.requires_grad_(False)
    torch.manual_seed(keyed_seed(seed, "initialisation"))
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank if recipe.lora_alpha is None else recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=[*recipe.lora_layers, *(["class_embed"] if with_class_table else [])],
        init_lora_weights=True,
    )
    transformer.add_adapter(config, adapter_name=ADAPTER_NAME)


class LoraAdapter(ModelMixin, ConfigMixin):
    """
    The parameters of one adapter, by the names they have in a file of diffusers, as a model.

    `save_pretrained` writes what `transformer.save_lora_adapter` writes, with a [`LoraInfo`] beside it.

    Args:
        info (`dict`): The arguments of [`LoraInfo`].
        peft_config (`dict`): peft's settings, in plain types.
        shapes (`dict[str, list[int]]`): Shape of every parameter.
    """

    @register_to_config
    def __init__(self, info: dict, peft_config: dict, shapes: dict):
        super().__init__()
        for name, shape in shapes.items():
            self._register(name, nn.Parameter(torch.empty(shape)))

    def _register(self, path: str, parameter: nn.Parameter) -> None:
        """A parameter's name must have no dots: what stands before one becomes a module."""
        module, parts = self, path.split(".")
        for part in parts[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(parts[-1], parameter)

    @classmethod
    def of(cls, transformer: ModelMixin, info: dict[str, Any]) -> "LoraAdapter":
        """
        The adapter of a transformer.

        Args:
            transformer (`ModelMixin`): From [`add_lora`], on its device.
            info (`dict`): The arguments of [`LoraInfo`].

        Returns:
            [`LoraAdapter`]: It holds the very parameters of the transformer's layers.
        """
        parameters = {
            name.replace(f".{ADAPTER_NAME}", ""): parameter
            for name, parameter in transformer.named_parameters()
            if parameter.requires_grad
        }
        # sets become lists, and enumerations their values
        settings = json.loads(json.dumps(transformer.peft_config[ADAPTER_NAME].to_dict(), default=sorted))
        with torch.device("meta"):
            shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
            adapter = cls(info=info, peft_config=settings, shapes=shapes)
        for name, parameter in parameters.items():
            adapter._register(name, parameter)
        return adapter

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write the adapter.

        Args:
            save_directory (`str` or `os.PathLike`): Folder, made if it does not exist.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self.config.peft_config, indent=2, sort_keys=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: settings}
        save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata=metadata)
        LoraInfo(**self.config.info).save_config(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike) -> "LoraAdapter":
        """
        Read an adapter.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder that `save_pretrained` has written.

        Returns:
            [`LoraAdapter`]: On the CPU.
        """
        folder = Path(pretrained_model_name_or_path)
        info = LoraInfo.load_config(folder)
        info = {name: value for name, value in info.items() if not name.startswith("_")}
        with safe_open(folder / LORA_WEIGHT_NAME_SAFE, framework="pt") as file:
            settings = json.loads(file.metadata()[LORA_ADAPTER_METADATA_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        with torch.device("meta"):
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            adapter = cls(info=info, peft_config=settings, shapes=shapes)
        adapter.load_state_dict(tensors, assign=True)
        return adapter
