"""What a LoRA adapter of a generator must say beside its weights, so that a pipeline can take it up."""

from diffusers.configuration_utils import ConfigMixin, register_to_config


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
