"""The one attention, the one transformer block and their parts: every model of the library is a stack of these."""

from collections.abc import Iterable
from types import FunctionType, MethodType
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn


# Keys in bfloat16 on a CPU: lengths from the first of these to before the second take attention up to 2.8 times as
# long as the next multiple of 32, that of the published encoder (385) among them: benchmarks/results/attention.md
_PADDED_KEYS = ((193, 256), (385, 416), (452, 512))
_PADDED_MULTIPLE = 32
_FAST_MULTIPLE = 16  # multiples of it are fast as they are


def apply_rotary_emb(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotate adjacent channel pairs `(2j, 2j + 1)` of every head by its own angle.

    The rotated channels come as all first ones of the pairs, then all second ones: scores do not depend on an order of
    channels that queries and keys share, and putting the pairs together again would take longer than the rotation.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, heads, head_dim)`): Queries or keys.
        cos, sin (`torch.Tensor` of shape `(sequence_length, heads or 1, head_dim // 2)`):
            Float32 or float64 tables; one head's tables serve all heads.

    Returns:
        `torch.Tensor`: Shape and dtype of `hidden_states`; the rotation itself runs in float32 at least.
    """
    dtype = torch.promote_types(hidden_states.dtype, cos.dtype)
    first, second = (half.to(dtype) for half in hidden_states.unflatten(-1, (-1, 2)).unbind(-1))
    rotated = [torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(first * sin, second, cos)]
    return torch.cat(rotated, dim=-1).to(hidden_states.dtype)


def padded_length(length: int) -> int:
    """
    To how many keys in bfloat16 on a CPU `length` keys are lengthened.

    Args:
        length (`int`): Number of keys.

    Returns:
        `int`: The next multiple of 32, or `length` itself where torch's attention is not faster for it.
    """
    gains = any(low <= length < high for low, high in _PADDED_KEYS) and length % _FAST_MULTIPLE != 0
    return length + -length % _PADDED_MULTIPLE if gains else length


def pad_keys(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    Lengthen keys and values on a CPU where torch's attention is faster for it.

    Args:
        key, value (`torch.Tensor` of shape `(batch_size, sequence_length, heads, head_dim)`): Keys and values.

    Returns:
        `tuple`: Keys and values, and a mask of shape `(1, 1, 1, sequence_length)` that is False where they are
        padding, `None` if nothing was padded.
    """
    length = key.shape[1]
    if key.device.type != "cpu" or key.dtype != torch.bfloat16:
        return key, value, None
    padded = padded_length(length)
    if padded == length:
        return key, value, None
    # not `F.pad`, which fills all of its output before it copies the input
    padding = key.new_zeros(key.shape[0], padded - length, *key.shape[2:])
    key, value = (torch.cat([part, padding], dim=1) for part in (key, value))
    mask = torch.arange(padded, device=key.device) < length
    return key, value, mask.view(1, 1, 1, -1)


class MAETokAttnProcessor:
    """Self-attention through diffusers' attention dispatcher, so that every attention backend of diffusers applies."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "MAETokAttention",
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        kept: slice | None = None,
    ) -> torch.Tensor:
        kept = slice(None) if kept is None else kept
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
            query = query[:, kept]
        else:
            query, key, value = attn.to_q(hidden_states[:, kept]), attn.to_k(hidden_states), attn.to_v(hidden_states)

        # -1 absorbs the head count: under tensor parallelism a rank holds a slice of the heads
        query = query.unflatten(-1, (-1, attn.head_dim))  # (B, S, heads, head_dim)
        key = key.unflatten(-1, (-1, attn.head_dim))
        value = value.unflatten(-1, (-1, attn.head_dim))

        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query = apply_rotary_emb(query, *(table[kept] for table in rotary_emb))
            key = apply_rotary_emb(key, *rotary_emb)
        # other backends may take no mask
        backend = self._attention_backend or _AttentionBackendRegistry._active_backend
        if attention_mask is None and self._parallel_config is None and backend == AttentionBackendName.NATIVE:
            key, value, attention_mask = pad_keys(key, value)

        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)  # (B, S, dim)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class RMSNorm(nn.RMSNorm):
    """Root mean square norm (arXiv 1910.07467) with a learned scale, whose output has the dtype of its input."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # torch's kernels want one dtype; under autocast the scale is float32 and the tokens are not
        return F.rms_norm(hidden_states, self.normalized_shape, self.weight.to(hidden_states.dtype), self.eps)


def build_norm(norm_type: Literal["layer_norm", "rms_norm"], dim: int, eps: float, affine: bool) -> nn.Module:
    """
    The norm of a block or of a model's end.

    Args:
        norm_type (`str`): `"layer_norm"` or `"rms_norm"`.
        dim (`int`): Width of the tokens.
        eps (`float`): Added to the variance.
        affine (`bool`): Whether a layer norm scales and shifts; an RMS norm always has its scale.

    Returns:
        `torch.nn.Module`: The norm.
    """
    if norm_type == "rms_norm":
        return RMSNorm(dim, eps=eps)
    return nn.LayerNorm(dim, eps=eps, elementwise_affine=affine)


class MAETokAttention(nn.Module, AttentionModuleMixin):
    """
    Multi-head self-attention with a biased output projection. `kept` names the tokens that attend, if not all do.

    Args:
        dim (`int`): Width of the tokens.
        num_attention_heads (`int`): Number of heads.
        attention_head_dim (`int`): Channels per head.
        qkv_bias (`bool`, *optional*, defaults to `True`): Whether the query, key and value projections have biases.
        qk_norm (`bool`, *optional*, defaults to `False`):
            Whether each head's queries and keys pass an RMS norm, before they are rotated (arXiv 2302.05442).
        processor (*optional*): Attention processor; defaults to [`MAETokAttnProcessor`].
    """

    _default_processor_cls = MAETokAttnProcessor
    _available_processors = [MAETokAttnProcessor]
    # read by diffusers' layer-skipping hooks, which look it up on every attention module
    is_cross_attention = False

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        processor=None,
    ):
        super().__init__()
        self.heads = num_attention_heads
        self.head_dim = attention_head_dim
        self.inner_dim = num_attention_heads * attention_head_dim
        self.use_bias = qkv_bias  # the name under which diffusers looks it up to fuse the projections

        self.to_q = nn.Linear(dim, self.inner_dim, bias=qkv_bias)
        self.to_k = nn.Linear(dim, self.inner_dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, self.inner_dim, bias=qkv_bias)
        self.norm_q = RMSNorm(attention_head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = RMSNorm(attention_head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, dim), nn.Dropout(0.0)])
        self.set_processor(processor if processor is not None else self._default_processor_cls())

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        kept: slice | None = None,
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, attention_mask, rotary_emb, kept)


class LayerScale(nn.Module):
    """Learned per-channel scale of a residual branch (CaiT, arXiv 2103.17239, equation 2)."""

    def __init__(self, dim: int, init_value: float):
        super().__init__()
        self.init_value = init_value
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops a residual branch of a whole sample with `drop_prob`."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * (hidden_states.new_empty(shape).bernoulli_(keep_prob) / keep_prob)


class Modulation(nn.Module):
    """
    SiLU, then one linear that gives `num_chunks` modulation terms.

    Args:
        conditioning_dim (`int`): Channels of the conditioning.
        dim (`int`): Width of the tokens that are modulated.
        num_chunks (`int`): Number of terms.
    """

    def __init__(self, conditioning_dim: int, dim: int, num_chunks: int):
        super().__init__()
        self.num_chunks = num_chunks
        self.linear = nn.Linear(conditioning_dim, num_chunks * dim)

    def forward(self, conditioning: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(F.silu(conditioning)).chunk(self.num_chunks, dim=-1)


def modulate_latents(
    hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, in_place: bool = False
) -> torch.Tensor:
    """
    Scale and shift the trailing latent tokens of a sequence.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, dim)`): Tokens; the latents come last.
        shift, scale (`torch.Tensor` of shape `(batch_size, num_latent_tokens, dim)`): Applied as `x * scale + shift`.
        in_place (`bool`, *optional*, defaults to `False`):
            Whether `hidden_states` itself is changed: the other tokens, the most, are then not even copied.

    Returns:
        `torch.Tensor`: Shape of `hidden_states`, or `hidden_states` itself.
    """
    others = hidden_states.shape[1] - scale.shape[1]
    if in_place:
        hidden_states[:, others:].mul_(scale).add_(shift)
        return hidden_states
    # cloned: the gradient of `scale` needs the latents, and a view of them would keep all other tokens as well
    latents = hidden_states[:, others:].clone()
    return torch.cat([hidden_states[:, :others], latents * scale + shift], dim=1)


def is_private(norm: nn.Module) -> bool:
    """
    Whether nobody but its caller can come to hold the output of a norm.

    Args:
        norm (`torch.nn.Module`): The norm.

    Returns:
        `bool`: False with gradients, under transforms of `torch.func` or the compiler (which fuses copies, and fails
        on some changes in place), and with hooks on the norm or on all modules.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    # diffusers' and accelerate's hooks replace `forward`
    return not (norm._forward_hooks or "forward" in vars(norm) or nn.modules.module._has_any_global_hook())


class TransformerBlock(nn.Module):
    """
    The pre-norm transformer block of every model here: attention, then MLP, each on a residual branch.

    Args:
        dim (`int`): Width of the tokens.
        num_attention_heads (`int`): Number of heads.
        attention_head_dim (`int`): Channels per head.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Hidden width of the MLP over `dim`; a gated MLP gets two thirds of it, and so as many parameters.
        activation_fn (`str`, *optional*, defaults to `"gelu"`):
            `"gelu"` (exact; tokenizer, U-SiT), `"gelu-approximate"` (tanh; SiT) or `"swiglu"` (gated; LightningDiT).
        modulation (`str`, *optional*):
            What the conditioning does. `None`: nothing, the norms are affine and LayerScale may scale the branches.
            `"latent"`: the conditioning is the latents of shape `(batch_size, num_latent_tokens, conditioning_dim)`,
            which scale and shift the trailing latent tokens after each norm. `"adaln_zero"`: it is one vector of shape
            `(batch_size, conditioning_dim)`, which shifts, scales and gates every token (DiT, arXiv 2212.09748).
        conditioning_dim (`int`, *optional*): Channels of the conditioning, if there is any.
        layer_scale_init_value (`float`, *optional*, defaults to 1e-5):
            Initial LayerScale, without modulation only. `None` for no LayerScale.
        drop_path_rate (`float`, *optional*, defaults to 0.0): Stochastic depth of both branches, in training only.
        norm_type (`str`, *optional*, defaults to `"layer_norm"`): `"layer_norm"` or `"rms_norm"`.
        norm_eps (`float`, *optional*, defaults to 1e-6): Added to the variance in the norms.
        qkv_bias (`bool`, *optional*, defaults to `True`): See [`MAETokAttention`].
        qk_norm (`bool`, *optional*, defaults to `False`): See [`MAETokAttention`].
        skip_connection (`bool`, *optional*, defaults to `False`):
            Whether the block takes the tokens of an earlier one, `skip`, and first merges them with its own by
            concatenation and a linear (U-ViT, arXiv 2209.12152).
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float = 4.0,
        activation_fn: str = "gelu",
        modulation: Literal["latent", "adaln_zero"] | None = None,
        conditioning_dim: int | None = None,
        layer_scale_init_value: float | None = 1e-5,
        drop_path_rate: float = 0.0,
        norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm",
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        skip_connection: bool = False,
    ):
        super().__init__()
        self.modulation_type = modulation
        affine = modulation is None
        if modulation is not None:
            self.modulation = Modulation(conditioning_dim, dim, 4 if modulation == "latent" else 6)

        self.norm1 = build_norm(norm_type, dim, norm_eps, affine)
        self.attn = MAETokAttention(dim, num_attention_heads, attention_head_dim, qkv_bias, qk_norm)
        self.norm2 = build_norm(norm_type, dim, norm_eps, affine)
        # rounded: a ratio that a converter divides out of two widths may miss the integer by an ulp
        inner_dim = int(2 * round(dim * mlp_ratio) / 3) if activation_fn == "swiglu" else round(dim * mlp_ratio)
        self.ff = FeedForward(dim, inner_dim=inner_dim, activation_fn=activation_fn)
        layer_scale = affine and layer_scale_init_value is not None
        self.scale1 = LayerScale(dim, layer_scale_init_value) if layer_scale else nn.Identity()
        self.scale2 = LayerScale(dim, layer_scale_init_value) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        # inside the block, so that caches that pass tokens through a block pass them by its merge as well
        self.skip_proj = nn.Linear(2 * dim, dim) if skip_connection else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        skip: torch.Tensor | None = None,
        kept: slice | None = None,
    ) -> torch.Tensor:
        # `kept`: the tokens that leave, where a model wants no others; those are keys and values only
        if self.skip_proj is not None:
            # under autocast the layer returns low precision, in which what the blocks add must not be summed
            hidden_states = self.skip_proj(torch.cat([hidden_states, skip], dim=-1)).to(hidden_states.dtype)
        if self.modulation_type == "adaln_zero":
            terms = [term.unsqueeze(1) for term in self.modulation(conditioning)]  # (B, 1, dim) each
            shift1, scale1, gate1, shift2, scale2, gate2 = terms
            # one pass over the tokens where a product and a sum would be two
            normed = torch.addcmul(shift1, self.norm1(hidden_states), 1 + scale1)
            attended = self.drop_path(self.attn(normed, rotary_emb=rotary_emb))
            hidden_states = torch.addcmul(hidden_states, gate1, attended)
            normed = torch.addcmul(shift2, self.norm2(hidden_states), 1 + scale2)
            return torch.addcmul(hidden_states, gate2, self.drop_path(self.ff(normed)))

        normed = self.norm1(hidden_states)
        if self.modulation_type == "latent":
            shift1, scale1, shift2, scale2 = self.modulation(conditioning)  # (B, L, dim) each
            own = normed is not hidden_states and is_private(self.norm1)  # a norm may have been taken out
            normed = modulate_latents(normed, shift1, scale1, in_place=own)
        attended = self.attn(normed, rotary_emb=rotary_emb, kept=kept)
        if kept is not None:
            hidden_states = hidden_states[:, kept]
        hidden_states = hidden_states + self.drop_path(self.scale1(attended))
        normed = self.norm2(hidden_states)
        if self.modulation_type == "latent" and kept is None:  # latents, which are modulated, do not leave a decoder
            own = normed is not hidden_states and is_private(self.norm2)
            normed = modulate_latents(normed, shift2, scale2, in_place=own)
        return hidden_states + self.drop_path(self.scale2(self.ff(normed)))


def run_block(model: nn.Module, block: TransformerBlock, *args) -> torch.Tensor:
    """
    Run one block of a model, recomputed in the backward pass if the model's gradient checkpointing is switched on.

    Args:
        model (`torch.nn.Module`): Holder of the block and of the attribute `gradient_checkpointing`.
        block ([`TransformerBlock`]): The block.
        args: Arguments of its `forward`, all positional: diffusers' checkpointing takes no others.

    Returns:
        `torch.Tensor`: The block's tokens.
    """
    if torch.is_grad_enabled() and model.gradient_checkpointing:
        return model._gradient_checkpointing_func(block, *args)
    return block(*args)


def compile_apart(blocks: Iterable[TransformerBlock], *args, **kwargs) -> None:
    """
    Compile one stack of equal blocks apart from other stacks: one graph for all of `blocks`.

    torch.compile caches graphs by code object and counts every graph beyond the first as a recompilation, up to a
    limit that is an error under `fullgraph=True`. Stacks that differ in size or modulation need graphs of their own,
    so each is given a copy of the code of [`TransformerBlock.forward`].

    Args:
        blocks (`Iterable[TransformerBlock]`): The stack.
        args, kwargs: Passed on to `torch.compile`.
    """
    original = TransformerBlock.forward
    forward = FunctionType(original.__code__.replace(), original.__globals__, original.__name__, original.__defaults__)
    for block in blocks:
        if "forward" not in vars(block):  # hooks (offloading, casting, caches) already replace it: leave theirs
            block.forward = MethodType(forward, block)
        block.compile(*args, **kwargs)
