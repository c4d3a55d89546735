from .pipeline_maetok import MAETokDiffusionPipeline


__all__ = ["MAETokDiffusionPipeline"]
