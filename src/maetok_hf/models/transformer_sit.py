"""SiT on 1D latent tokens: the class-conditional velocity model of the MAETok paper."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .embeddings import sincos_position_embedding
from .layers import Modulation, TransformerBlock


class SiTTransformer1DModel(ModelMixin, AttentionMixin, PeftAdapterMixin, CacheMixin, ConfigMixin):
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

    Raises:
        ValueError: If a size is not positive, the width is odd, a probability lies outside [0, 1] or the path is
            unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]

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
    ):
        super().__init__()
        sizes = {
            "sample_size": sample_size,
            "in_channels": in_channels,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
        }
        for name, value in sizes.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        hidden_size = num_attention_heads * attention_head_dim
        if hidden_size % 2 != 0:
            raise ValueError(
                f"the width `num_attention_heads * attention_head_dim` must be even for the position table, got "
                f"{num_attention_heads} * {attention_head_dim} = {hidden_size}."
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must lie in [0, 1], got {class_dropout_prob}.")
        if path not in ("linear", "cosine"):
            raise ValueError(f"`path` must be 'linear' or 'cosine', got {path!r}.")

        self.gradient_checkpointing = False
        self.proj_in = nn.Linear(in_channels, hidden_size)
        # fixed, but stored in the authors' checkpoints and therefore in ours
        self.register_buffer("pos_embed", sincos_position_embedding(sample_size, hidden_size))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.class_embed = nn.Embedding(num_classes + 1, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                activation_fn="gelu-approximate",
                modulation="adaln_zero",
                conditioning_dim=hidden_size,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.norm_out_modulation = Modulation(hidden_size, hidden_size, 2)
        self.proj_out = nn.Linear(hidden_size, in_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        """The initialisation of DiT and SiT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embed.linear_2.weight, std=0.02)
        # every block starts as the identity and the model as the zero velocity (adaLN-Zero)
        for module in (*self.modules(), self.proj_out):
            linear = module.linear if isinstance(module, Modulation) else module if module is self.proj_out else None
            if linear is not None:
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def _drop_classes(self, class_labels: torch.Tensor, class_drop_mask: torch.Tensor | None) -> torch.Tensor:
        probability = self.config.class_dropout_prob
        if class_drop_mask is None and self.training and probability > 0:
            class_drop_mask = torch.rand(class_labels.shape, device=class_labels.device) < probability
        if class_drop_mask is None:
            return class_labels
        return torch.where(class_drop_mask, self.config.num_classes, class_labels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        class_drop_mask: torch.Tensor | None = None,
    ) -> Transformer2DModelOutput | tuple:
        """
        Predict the velocity.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, sample_size, in_channels)`): Noisy latents at
                `timestep`.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                Times in `[0, 1]`: 0 is data, 1 is noise. (Schedulers count 0..1000; divide before calling.)
            class_labels (`torch.LongTensor` of shape `(batch_size,)`):
                Classes in `[0, num_classes]`; `num_classes` is the null class.
            return_dict (`bool`, *optional*, defaults to `True`): Whether to return an output object or a tuple.
            class_drop_mask (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
                True where the label is replaced by the null class. If `None`, labels are dropped at random with
                `class_dropout_prob` in training mode, and never in evaluation mode.

        Returns:
            [`Transformer2DModelOutput`] with `sample`, the velocity, of the shape of `hidden_states`; a 1-tuple of it
            if `return_dict` is `False`.

        Raises:
            ValueError: If the latents' shape does not fit the config, or there is not one timestep and one label per
                sample.
        """
        expected = (self.config.sample_size, self.config.in_channels)
        if hidden_states.ndim != 3 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {expected[0]}, {expected[1]}), got "
                f"{tuple(hidden_states.shape)}."
            )

        if timestep.ndim != 1 or class_labels.ndim != 1 or class_labels.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"`timestep` and `class_labels` must have shape (batch,) = ({hidden_states.shape[0]},), got "
                f"{tuple(timestep.shape)} and {tuple(class_labels.shape)}."
            )

        # 1. Input
        hidden_states = self.proj_in(hidden_states)  # (B, L, D)
        hidden_states = hidden_states + self.pos_embed.to(hidden_states.dtype)
        time_features = self.time_proj(timestep).to(hidden_states.dtype)  # float32 inside
        class_labels = self._drop_classes(class_labels, class_drop_mask)
        conditioning = self.time_embed(time_features) + self.class_embed(class_labels)  # (B, D)

        # 2. Blocks
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)

        # 3. Output
        shift, scale = self.norm_out_modulation(conditioning)
        hidden_states = self.norm_out(hidden_states) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        velocity = self.proj_out(hidden_states)  # (B, L, C)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
