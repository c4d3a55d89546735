from .lora import add_named_classes, load_lora_into
from .pipeline_maetok import MAETokDiffusionPipeline


__all__ = ["MAETokDiffusionPipeline", "add_named_classes", "load_lora_into"]
