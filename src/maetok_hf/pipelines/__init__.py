"""From class labels to images: the pipeline, its guidance, and adapters in it."""

from .lora import add_named_classes, load_lora_into
from .pipeline_maetok import MAETokDiffusionPipeline


__all__ = ["MAETokDiffusionPipeline", "add_named_classes", "load_lora_into"]
