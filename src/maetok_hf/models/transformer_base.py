"""What the generators share: conditioning on time, class and guidance temperature, checks, the adaLN-Zero frame."""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .embeddings import sincos_position_embedding
from .layers import Modulation, TransformerBlock, build_norm, run_block
from .lora import LoraFusingMixin
from .model_card import ModelCardMixin, config_settings


class LatentTransformer1DModel(ModelCardMixin, ModelMixin, AttentionMixin, LoraFusingMixin, CacheMixin, ConfigMixin):
    """
    Base of the class-conditional velocity models of latent token sequences; not a model by itself.

    A subclass builds `proj_in`, `time_proj` (sinusoids), `time_embed`, `class_embed` and `transformer_blocks`, and
    implements `_velocity`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    # besides diffusers' own patterns: few weights, large errors, see benchmarks/results/quantization.md
    _skip_layerwise_casting_patterns = ["time_embed", "temperature_embed"]

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False
        self.temperature_embed = None
        self._check_config()
        self.hidden_size = self.config.num_attention_heads * self.config.attention_head_dim

    def _check_config(self) -> None:
        config = self.config
        for name in (
            "sample_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "mlp_ratio",
            "num_classes",
        ):  # fmt: skip
            if not config[name] > 0:
                raise ValueError(f"`{name}` must be positive, got {config[name]}.")
        heads, head_dim = config.num_attention_heads, config.attention_head_dim
        if heads * head_dim % 2 != 0:
            raise ValueError(
                f"the width `num_attention_heads * attention_head_dim` must be even for the sinusoids of positions "
                f"and times, got {heads} * {head_dim} = {heads * head_dim}."
            )
        if not 0 <= config.class_dropout_prob <= 1:
            raise ValueError(f"`class_dropout_prob` must lie in [0, 1], got {config.class_dropout_prob}.")
        if config.path not in ("linear", "cosine"):
            raise ValueError(f"`path` must be 'linear' or 'cosine', got {config.path!r}.")

    def _card_facts(self, repo_id: str) -> dict[str, Any]:
        name, config = type(self).__name__, self.config
        return {
            "summary": (
                f"A class-conditional diffusion transformer (`{name}`) on the latents of an image tokenizer, "
                f"{config.sample_size} tokens of {config.in_channels} channels: {config.num_layers} layers of width "
                f"{self.hidden_size}, {config.num_classes} classes."
            ),
            "code": (
                f"from maetok_hf import MAETokDiffusionPipeline, {name}\n\n"
                f'transformer = {name}.from_pretrained("{repo_id}")\n'
                "# the pipeline whose latents and classes it was trained on\n"
                'pipe = MAETokDiffusionPipeline.from_pretrained("path/to/pipeline", transformer=transformer)\n'
                "image = pipe(class_labels=0).images[0]"
            ),
            "settings": config_settings(self),
            "limits": [
                f"It generates the {config.num_classes} classes that it was trained on, and nothing that a text could "
                "ask for.",
                "It makes sense with the tokenizer, and the statistics of its latents, that it was trained with.",
            ],
            "tags": ["diffusion-transformer", "class-conditional-image-generation"],
        }

    # Changing a trained model

    def enable_temperature_embedding(self) -> None:
        """
        Give a model the embedding of the guidance temperature, for guidance-free training (GFT, arXiv 2501.15420) of a
        model that was trained without: its last layer is zero, so outputs stay what they were, at every temperature,
        until it is trained. Config entry `temperature_embedding` becomes `True`. A model that has the embedding keeps
        it. Call this before optimisers and averages are made of the parameters.
        """
        if self.temperature_embed is None:
            device, dtype = self.device, self.dtype
            self._add_temperature_embedding()
            self.temperature_embed.to(device, dtype)
            self.register_to_config(temperature_embedding=True)

    def _add_temperature_embedding(self) -> None:
        self.temperature_embed = TimestepEmbedding(self.time_proj.num_channels, self.hidden_size)
        nn.init.normal_(self.temperature_embed.linear_1.weight, std=0.02)
        nn.init.zeros_(self.temperature_embed.linear_1.bias)
        nn.init.zeros_(self.temperature_embed.linear_2.weight)
        nn.init.zeros_(self.temperature_embed.linear_2.bias)

    @torch.no_grad()
    def add_classes(self, count: int) -> None:
        """
        Enlarge the class table. The new classes have the indices from the old `num_classes` on and start as the mean
        of the old ones; the null class moves to the new last index. Outputs for old classes and the null class stay
        what they were. Config entry `num_classes` follows. Call this before optimisers, averages and adapters are made
        of the parameters.

        Args:
            count (`int`): Number of new classes.

        Raises:
            ValueError: If `count` is not positive or an adapter already wraps the class table.
        """
        if count <= 0:
            raise ValueError(f"`count` must be the number of new classes, at least 1, got {count}.")
        table = self.class_embed
        if type(table) is not nn.Embedding:
            raise ValueError(
                f"an adapter already wraps the class table (it is a `{type(table).__name__}`): call `add_classes` "
                "before adding the adapter."
            )
        if table.weight.is_meta:
            raise ValueError(
                "the weights of the class table are not here, as with sequential offloading: call `add_classes` (or "
                "load the adapter that adds classes) before `enable_sequential_cpu_offload`."
            )
        num_classes = self.config.num_classes
        classes, null = table.weight.split([num_classes, 1])
        mean = classes.float().mean(dim=0, keepdim=True).to(classes.dtype)
        # the module stays, and with it the hooks of casting and offloading that it may carry
        weight = torch.cat([classes, mean.expand(count, -1), null])
        table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
        table.num_embeddings += count
        self.register_to_config(num_classes=num_classes + count)

    # Forward

    def _check_inputs(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        guidance_temperature: torch.Tensor | None,
    ) -> None:
        expected = (self.config.sample_size, self.config.in_channels)
        if hidden_states.ndim != 3 or tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"`hidden_states` must have shape (batch, {expected[0]}, {expected[1]}), got "
                f"{tuple(hidden_states.shape)}."
            )
        batch_size = hidden_states.shape[0]
        if timestep.ndim != 1 or class_labels.ndim != 1 or class_labels.shape[0] != batch_size:
            raise ValueError(
                f"`timestep` and `class_labels` must have shape (batch,) = ({batch_size},), got "
                f"{tuple(timestep.shape)} and {tuple(class_labels.shape)}."
            )
        if guidance_temperature is None:
            return
        if self.temperature_embed is None:
            raise ValueError(
                "`guidance_temperature` was given to a model without a temperature embedding: leave it out, or train "
                "a model for it (`temperature_embedding=True` in the config of a new one, "
                "`enable_temperature_embedding()` on a trained one)."
            )
        if guidance_temperature.ndim != 1 or guidance_temperature.shape[0] != batch_size:
            raise ValueError(
                f"`guidance_temperature` must have shape (batch,) = ({batch_size},), got "
                f"{tuple(guidance_temperature.shape)}."
            )

    def _drop_classes(self, class_labels: torch.Tensor, class_drop_mask: torch.Tensor | None) -> torch.Tensor:
        probability = self.config.class_dropout_prob
        if class_drop_mask is None and self.training and probability > 0:
            class_drop_mask = torch.rand(class_labels.shape, device=class_labels.device) < probability
        if class_drop_mask is None:
            return class_labels
        return torch.where(class_drop_mask, self.config.num_classes, class_labels)

    def _embed_time(
        self, timestep: torch.Tensor, guidance_temperature: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        # the sinusoids are float32 inside
        embedding = self.time_embed(self.time_proj(timestep).to(dtype))  # (B, D)
        if self.temperature_embed is None:
            return embedding
        if guidance_temperature is None:
            guidance_temperature = torch.ones_like(timestep, dtype=torch.float32)
        # in the range of the times, [0, 1], and by the same sinusoids
        return embedding + self.temperature_embed(self.time_proj(guidance_temperature).to(dtype))

    def _velocity(
        self, hidden_states: torch.Tensor, time_embedding: torch.Tensor, class_embedding: torch.Tensor
    ) -> torch.Tensor:
        """Velocity `(B, L, C)` from projected tokens `(B, L, D)` and the embeddings `(B, D)` of time and class."""
        raise NotImplementedError

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        return_dict: bool = True,
        class_drop_mask: torch.Tensor | None = None,
        guidance_temperature: torch.Tensor | None = None,
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
            guidance_temperature (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Temperatures in `(0, 1]` of guidance-free training, 1 over the guidance scale. 1 by default. Only for
                models with a temperature embedding.

        Returns:
            [`Transformer2DModelOutput`] with `sample`, the velocity, of the shape of `hidden_states`; a 1-tuple of it
            if `return_dict` is `False`.

        Raises:
            ValueError: If the latents' shape does not fit the config, there is not one timestep, label and temperature
                per sample, or the model has no temperature embedding.
        """
        self._check_inputs(hidden_states, timestep, class_labels, guidance_temperature)
        hidden_states = self.proj_in(hidden_states)  # (B, L, D)
        # Linear layers return low precision under autocast; the sum of what the blocks add must not be kept in it.
        if torch.is_autocast_enabled(hidden_states.device.type):
            hidden_states = hidden_states.float()
        time_embedding = self._embed_time(timestep, guidance_temperature, hidden_states.dtype)
        class_embedding = self.class_embed(self._drop_classes(class_labels, class_drop_mask))
        velocity = self._velocity(hidden_states, time_embedding, class_embedding)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)


class AdaLNTransformer1DModel(LatentTransformer1DModel):
    """
    Base of the models with fixed positions whose blocks are modulated by the sum of time and class embedding
    (adaLN-Zero, arXiv 2212.09748); not a model by itself.
    """

    def _build(self, norm_type: str, **block_options) -> None:
        """Make the modules; `block_options` are further arguments of [`TransformerBlock`]."""
        config, hidden_size = self.config, self.hidden_size
        self.proj_in = nn.Linear(config.in_channels, hidden_size)
        # fixed, but stored in the authors' checkpoints and therefore in ours
        self.register_buffer("pos_embed", sincos_position_embedding(config.sample_size, hidden_size))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, hidden_size)
        self.class_embed = nn.Embedding(config.num_classes + 1, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                hidden_size,
                config.num_attention_heads,
                config.attention_head_dim,
                config.mlp_ratio,
                modulation="adaln_zero",
                conditioning_dim=hidden_size,
                norm_type=norm_type,
                **block_options,
            )
            for _ in range(config.num_layers)
        )
        self.norm_out = build_norm(norm_type, hidden_size, eps=1e-6, affine=False)
        self.norm_out_modulation = Modulation(hidden_size, hidden_size, 2)
        self.proj_out = nn.Linear(hidden_size, config.in_channels)
        self._init_weights()
        if config.temperature_embedding:
            self._add_temperature_embedding()  # last: the other weights of a seed do not depend on it

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
        modulations = [module.linear for module in self.modules() if isinstance(module, Modulation)]
        for linear in (*modulations, self.proj_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def _rotary_emb(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosine and sine tables for the attention, if the model rotates its queries and keys."""
        return None

    def _velocity(
        self, hidden_states: torch.Tensor, time_embedding: torch.Tensor, class_embedding: torch.Tensor
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.pos_embed.to(hidden_states.dtype)
        conditioning = time_embedding + class_embedding  # (B, D)
        rotary_emb = self._rotary_emb(hidden_states)
        for block in self.transformer_blocks:
            hidden_states = run_block(self, block, hidden_states, conditioning, rotary_emb)
        shift, scale = self.norm_out_modulation(conditioning)
        hidden_states = self.norm_out(hidden_states) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        return self.proj_out(hidden_states)  # (B, L, C)
