"""SiT on 1D latent tokens: the class-conditional velocity model of the MAETok paper."""

from diffusers.configuration_utils import register_to_config

from .transformer_base import AdaLNTransformer1DModel


class SiTTransformer1DModel(AdaLNTransformer1DModel):
    r"""
    SiT ([arXiv 2401.08740](https://huggingface.co/papers/2401.08740)) over a sequence of continuous latent tokens.

    Predicts the velocity `d x_t / d t` of a path from data (t = 0) to noise (t = 1); for the linear path that is
    `noise - data`. Latents are normalised ones (`normalize_latents`).

    Published sizes, with 32 channels and 1000 classes:

    | size | `num_layers` | `num_attention_heads` | `attention_head_dim` | width | parameters |
    | --- | --- | --- | --- | --- | --- |
    | S | 12 | 6 | 64 | 384 | 33 M |
    | B | 12 | 12 | 64 | 768 | 130 M |
    | L | 24 | 16 | 64 | 1024 | 458 M |
    | XL (default) | 28 | 16 | 72 | 1152 | 675 M |

    This model inherits from [`ModelMixin`]. Check the superclass documentation for its generic methods (loading,
    saving, moving, casting).

    Parameters:
        sample_size (`int`, *optional*, defaults to 128): Number of latent tokens.
        in_channels (`int`, *optional*, defaults to 32): Channels of a latent token.
        num_layers (`int`, *optional*, defaults to 28): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Number of attention heads.
        attention_head_dim (`int`, *optional*, defaults to 72): Channels per head.
        mlp_ratio (`float`, *optional*, defaults to 4.0): Hidden width of the MLPs over the width.
        num_classes (`int`, *optional*, defaults to 1000): Number of classes. The null class has index `num_classes`.
        class_dropout_prob (`float`, *optional*, defaults to 0.1):
            Probability with which a label becomes the null class, in training only.
        path (`str`, *optional*, defaults to `"linear"`):
            The path the model is trained on, `"linear"` or `"cosine"`; schedulers must follow the same one.
        temperature_embedding (`bool`, *optional*, defaults to `False`):
            Whether the model takes a guidance temperature (guidance-free training, arXiv 2501.15420).

    Raises:
        ValueError: If a size is not positive, the width is odd, a probability lies outside [0, 1] or the path is
            unknown.
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
        temperature_embedding: bool = False,
    ):
        super().__init__()
        self._build("layer_norm", activation_fn="gelu-approximate")
