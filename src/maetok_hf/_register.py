"""Make diffusers know this library's classes, as it knows its own.

diffusers resolves the classes named in a `model_index.json` through two closed tables. Without an entry in them a
saved pipeline would record inner module paths (so that moving a file breaks every checkpoint) and could not be loaded
from the Hub.
"""

import diffusers
from diffusers.pipelines import pipeline_loading_utils

from .models.autoencoder_mae import AutoencoderMAE
from .models.layers import MAETokAttnProcessor, TransformerBlock
from .models.transformer_lightning_dit import LightningDiTTransformer1DModel
from .models.transformer_sit import SiTTransformer1DModel
from .models.transformer_usit import USiTTransformer1DModel
from .pipelines.pipeline_maetok import MAETokDiffusionPipeline


_LOADABLE = {
    name: ["save_pretrained", "from_pretrained"] for name in ("ModelMixin", "SchedulerMixin", "DiffusionPipeline")
}
_CLASSES = (
    MAETokDiffusionPipeline,
    AutoencoderMAE,
    SiTTransformer1DModel,
    LightningDiTTransformer1DModel,
    USiTTransformer1DModel,
)


def _skip_attention(attn, hidden_states, *args, **kwargs):
    """What attention returns when a layer-skipping guider leaves it out: its input."""
    return hidden_states


def register() -> None:
    """Enter the library into diffusers' tables; calling it twice changes nothing."""
    # saved pipelines name "maetok_hf" as the library of our components
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault("maetok_hf", dict(_LOADABLE))
    # `DiffusionPipeline.from_pretrained` and `AutoModel.from_pretrained` look the class name up on the diffusers
    # module
    for cls in _CLASSES:
        setattr(diffusers, cls.__name__, cls)

    _register_hooks()


def _register_hooks() -> None:
    """Let diffusers' caches and layer-skipping guiders find our blocks and attention processors, by their class."""
    try:
        from diffusers.hooks._helpers import (
            AttentionProcessorMetadata,
            AttentionProcessorRegistry,
            TransformerBlockMetadata,
            TransformerBlockRegistry,
        )

        blocks, processors = TransformerBlockRegistry._registry, AttentionProcessorRegistry._registry
    except (ImportError, AttributeError):
        # a private module: without it everything but caches and layer skipping works, and those say what they miss
        return
    # The registries' own `register` would first import every in-tree transformer, a second of import time, so the
    # entries are made directly.
    block = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
    block._cls = TransformerBlock
    blocks[TransformerBlock] = block
    processors[MAETokAttnProcessor] = AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention)
