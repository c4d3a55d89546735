"""LoRA adapters of a generator: fusing, and what one must say beside its weights so that a pipeline can take it up."""

from collections.abc import Iterator
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin


class LoraFusingMixin(PeftAdapterMixin):
    """
    diffusers' adapters with a scale of `fuse_lora` that holds for embeddings too: peft's `scale_layer` passes over
    them, so that an adapter of the class table would be fused at full strength, and never gives a scale back.
    """

    def _adapted_layers(self) -> Iterator[Any]:
        """peft's layers, each with the `scaling` of its adapters and the names of the merged ones."""
        names = ("scaling", "merged_adapters")
        return (module for module in self.modules() if all(hasattr(module, name) for name in names))

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """
        Merge adapters into the weights, until `unfuse_lora`.

        Args:
            lora_scale (`float`, *optional*, defaults to 1.0): Strength, times that of `set_adapters`.
            safe_fusing (`bool`, *optional*, defaults to `False`): Whether to refuse weights that are not finite.
            adapter_names (`list[str]`, *optional*): Adapters to merge; by default the active ones.

        Raises:
            ValueError: If `safe_fusing` finds a weight that is not finite.
        """
        for layer in self._adapted_layers():
            names = set(adapter_names or layer.active_adapters) - set(layer.merged_adapters)
            before = {name: layer.scaling[name] for name in names & layer.scaling.keys()}
            # `unmerge` subtracts by the scaling that it finds: it stays until then
            layer.scaling.update({name: lora_scale * value for name, value in before.items()})
            layer.scaling_before_fusing = getattr(layer, "scaling_before_fusing", {}) | before
        super().fuse_lora(1.0, safe_fusing, adapter_names)

    def unfuse_lora(self) -> None:
        """Take merged adapters out of the weights again; their strengths are those from before `fuse_lora`."""
        super().unfuse_lora()
        for layer in self._adapted_layers():
            layer.scaling.update(getattr(layer, "scaling_before_fusing", {}))
            layer.scaling_before_fusing = {}


class LoraInfo(ConfigMixin):
    """
    The `lora_info.json` that lies beside `pytorch_lora_weights.safetensors`: the model that the adapter belongs to,
    and the classes that it adds. `LoraInfo.load_config` reads it from a folder or from the Hub.

    Args:
        base_model (`str`): Name of the pipeline that was fine-tuned; of a local one the last part of its path.
        transformer (`dict`): Class and sizes of its transformer, see [`~LoraInfo.sizes_of`].
        num_base_classes (`int`): Classes of its transformer, without those that the adapter adds.
        id2label (`dict[int, str]`): Names of the classes, those that the adapter adds among them: these have the
            indices from `num_base_classes` on.
        trained_classes (`list[int]`): Classes that the adapter was trained on.
    """

    config_name = "lora_info.json"

    @register_to_config
    def __init__(
        self,
        base_model: str,
        transformer: dict,
        num_base_classes: int,
        id2label: dict,
        trained_classes: list,
    ):
        pass

    @staticmethod
    def sizes_of(transformer: ConfigMixin) -> dict[str, str | int]:
        """
        What two transformers must share for an adapter of one to fit the other.

        Args:
            transformer (`ModelMixin`): A generator.

        Returns:
            `dict[str, str | int | float | bool]`: Name of its class, and config values.
        """
        names = ("sample_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio")
        names += ("path", "temperature_embedding")
        return {"class": type(transformer).__name__} | {name: transformer.config[name] for name in names}
