"""LightningDiT on 1D latent tokens: the frame of SiT with the parts of today's language models."""

import torch
from diffusers.configuration_utils import register_to_config

from .embeddings import rotary_tables
from .transformer_base import AdaLNTransformer1DModel


class LightningDiTTransformer1DModel(AdaLNTransformer1DModel):
    r"""
    LightningDiT ([arXiv 2501.01423](https://huggingface.co/papers/2501.01423)) over a sequence of continuous latent
    tokens: [`SiTTransformer1DModel`] with RMS norms, gated MLPs (SwiGLU) and rotary positions over the token index, in
    addition to the fixed ones.

    Predicts the velocity `d x_t / d t` of a path from data (t = 0) to noise (t = 1); for the linear path that is
    `noise - data`. Latents are normalised ones (`normalize_latents`).

    Sizes, with 32 channels and 1000 classes:

    | size | `num_layers` | `num_attention_heads` | `attention_head_dim` | width | parameters |
    | --- | --- | --- | --- | --- | --- |
    | B | 12 | 12 | 64 | 768 | 130 M |
    | XL (default) | 28 | 16 | 72 | 1152 | 675 M |

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods (loading,
    saving, moving, casting).

    Parameters:
        sample_size (`int`, *optional*, defaults to 128): Number of latent tokens.
        in_channels (`int`, *optional*, defaults to 32): Channels of a latent token.
        num_layers (`int`, *optional*, defaults to 28): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads.
        attention_head_dim (`int`, *optional*, defaults to 72): Channels per head, even.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Hidden width of a plain MLP over the width; the gated ones have two thirds of it, rounded down.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes. The null class has index `num_classes`.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            Probability with which a label becomes the null class, in training only.
        path (`str`, *optional*, defaults to `"linear"`):
            The path the model is trained on, `"linear"` or `"cosine"`; schedulers must follow the same one.
        qk_norm (`bool`, *optional*, defaults to `False`): Whether every head's queries and keys pass an RMS norm.
        temperature_embedding (`bool`, *optional*, defaults to `False`):
            Whether the model takes a guidance temperature (guidance-free training, arXiv 2501.15420).

    Raises:
        ValueError: If a size is not positive, `attention_head_dim` is odd, a probability lies outside [0, 1] or the
            path is unknown.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        in_channels: int = 32,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        path: str = "linear",
        qk_norm: bool = False,
        temperature_embedding: bool = False,
    ):
        super().__init__()
        if attention_head_dim % 2 != 0:
            raise ValueError(
                f"`attention_head_dim` must be even, because rotary positions turn pairs of channels, got "
                f"{attention_head_dim}."
            )
        self._rotary_tables: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}
        self._build("rms_norm", activation_fn="swiglu", qk_norm=qk_norm)

    def _rotary_emb(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # not a buffer, which would lose its precision when the model is cast
        device, dtype = hidden_states.device, torch.promote_types(hidden_states.dtype, torch.float32)
        sizes = self.config.sample_size, self.config.attention_head_dim
        if torch.compiler.is_compiling():  # the graph makes them, or has them as constants where it is frozen
            return rotary_tables(*sizes, device, dtype)
        if (device, dtype) not in self._rotary_tables:
            with torch.inference_mode(False):  # tables of a pass without gradients also serve one with them
                tables = rotary_tables(*sizes, device, dtype)
            if type(tables[0]) is not torch.Tensor:  # a fake one, of a pass that computes shapes
                return tables
            self._rotary_tables[device, dtype] = tables
        return self._rotary_tables[device, dtype]
