"""Attention, block and their parts against plain formulas."""

import contextlib
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from maetok_hf.models.layers import (
    DropPath,
    LayerScale,
    MAETokAttention,
    Modulation,
    RMSNorm,
    TransformerBlock,
    apply_rotary_emb,
    modulate_latents,
    pad_keys,
)
from tests.testing_utils import randomize_parameters, seeded_normal


def tables(length, heads, pairs, seed=0):
    angles = seeded_normal(length, heads, pairs, seed=seed)
    return angles, (angles.cos(), angles.sin())


def test_rotary_is_a_complex_product_of_adjacent_channels_whose_real_parts_come_first():
    hidden_states = seeded_normal(2, 5, 3, 8)
    angles, (cos, sin) = tables(5, 3, 4)
    rotated = torch.view_as_complex(hidden_states.unflatten(-1, (4, 2))) * torch.polar(torch.ones(()), angles)
    expected = torch.cat([rotated.real, rotated.imag], dim=-1)
    torch.testing.assert_close(apply_rotary_emb(hidden_states, cos, sin), expected)


def test_rotary_keeps_lengths_and_the_zero_angle_keeps_everything():
    hidden_states = seeded_normal(2, 5, 3, 8)
    _, (cos, sin) = tables(5, 3, 4)
    torch.testing.assert_close(apply_rotary_emb(hidden_states, cos, sin).norm(dim=-1), hidden_states.norm(dim=-1))
    unturned = apply_rotary_emb(hidden_states, torch.ones(5, 3, 4), torch.zeros(5, 3, 4))
    assert torch.equal(unturned, torch.cat([hidden_states[..., ::2], hidden_states[..., 1::2]], dim=-1))


def test_rotary_runs_in_float32_at_least():
    _, (cos, sin) = tables(5, 3, 4)
    exact = seeded_normal(2, 5, 3, 8)
    low = exact.to(torch.bfloat16)
    assert torch.equal(
        apply_rotary_emb(low, cos, sin), apply_rotary_emb(low.float(), cos, sin).to(torch.bfloat16)
    )  # fmt: skip
    double = apply_rotary_emb(exact.double(), cos.double(), sin.double())
    assert double.dtype == torch.float64
    assert 0 < (double - apply_rotary_emb(exact, cos, sin)).abs().max() < 1e-5


def reference_attention(attn, x, rotary_emb=None):
    """Softmax attention with 1 / sqrt(head_dim), one head at a time."""
    heads = []
    for head in range(attn.heads):
        channels = slice(head * attn.head_dim, (head + 1) * attn.head_dim)
        query, key, value = (linear(x)[..., channels] for linear in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = (
                t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
                for t, norm in ((query, attn.norm_q), (key, attn.norm_k))
            )
        if rotary_emb is not None:
            per_head = [table[:, head : head + 1] for table in rotary_emb]
            query, key = (apply_rotary_emb(t.unsqueeze(2), *per_head).squeeze(2) for t in (query, key))
        weights = (query @ key.mT / attn.head_dim**0.5).softmax(-1)
        heads.append(weights @ value)
    return attn.to_out[0](torch.cat(heads, dim=-1))


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=["plain", "qk_norm", "no_bias"])
@torch.no_grad()
def test_attention_matches_the_formula(rotary, fused, options):
    attn, x = randomize_parameters(MAETokAttention(12, 3, 8, **options)), seeded_normal(2, 5, 12)
    rotary_emb = tables(5, 3, 4)[1] if rotary else None
    expected = reference_attention(attn, x, rotary_emb)
    if fused:
        attn.fuse_projections()
    torch.testing.assert_close(attn(x, rotary_emb=rotary_emb), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_normalised_queries_and_keys_forget_their_scale():
    """Logits cannot grow: scaling the projections of queries and keys changes nothing, without the norm it does."""
    x = seeded_normal(2, 5, 12)
    for qk_norm in (True, False):
        attn = randomize_parameters(MAETokAttention(12, 3, 8, qk_norm=qk_norm))
        expected = attn(x)
        for linear, factor in ((attn.to_q, 50.0), (attn.to_k, 7.0)):
            linear.weight *= factor
            linear.bias *= factor
        assert torch.allclose(attn(x), expected, atol=1e-4) == qk_norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rms_norm_is_a_scaled_unit_root_mean_square_in_the_dtype_of_its_input(dtype):
    norm, x = randomize_parameters(RMSNorm(8, eps=1e-6)), seeded_normal(4, 8).to(dtype)
    assert norm(x).dtype == dtype
    rms = (norm(x).double() / norm.weight.double()).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kept", [slice(2, None), slice(1, 4), slice(0, 1)], ids=str)
@torch.no_grad()
def test_tokens_that_do_not_attend_change_nothing_for_those_that_do(kept, fused):
    attn, x = randomize_parameters(MAETokAttention(12, 3, 8)), seeded_normal(2, 5, 12)
    if fused:
        attn.fuse_projections()
    rotary_emb = tables(5, 3, 4)[1]
    expected = attn(x, rotary_emb=rotary_emb)[:, kept]
    torch.testing.assert_close(attn(x, rotary_emb=rotary_emb, kept=kept), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("modulation", [None, "latent"])
def test_block_whose_other_tokens_do_not_leave_has_the_same_tokens_and_gradients(modulation):
    block = randomize_parameters(TransformerBlock(12, 3, 4, modulation=modulation, conditioning_dim=2))
    x = seeded_normal(2, 7, 12).requires_grad_()
    conditioning = None if modulation is None else seeded_normal(2, 3, 2, seed=1)
    rotary_emb, kept = tables(7, 3, 2)[1], slice(1, 4)  # as in a decoder, where the latents come last
    weights = seeded_normal(2, 3, 12, seed=2)
    found = []
    for tokens in (
        block(x, conditioning, rotary_emb)[:, kept],
        block(x, conditioning, rotary_emb, None, kept),
    ):
        inputs = [x, *block.parameters()]
        gradients = torch.autograd.grad((tokens * weights).sum(), inputs)
        found.append([tokens, *gradients])
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [192, 385, 511])
def test_padded_keys_change_nothing_and_pad_to_fast_lengths(length):
    query, key, value = (seeded_normal(1, length, 2, 8, seed=seed).to(torch.bfloat16) for seed in range(3))
    padded_key, padded_value, mask = pad_keys(key, value)
    if length % 32 == 0:
        assert padded_key is key and padded_value is value and mask is None
        return
    assert padded_key.shape == padded_value.shape == (1, length + -length % 32, 2, 8)
    assert mask.sum() == length and mask[..., :length].all()

    def attention(key, value, mask):
        heads_first = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)

    torch.testing.assert_close(
        attention(padded_key, padded_value, mask), attention(key, value, None), atol=2e-2, rtol=2e-2
    )


@pytest.mark.parametrize(("length", "dtype"), [(385, torch.float32), (191, torch.bfloat16), (513, torch.bfloat16)])
def test_keys_are_not_padded_where_that_gains_nothing(length, dtype):
    key = torch.zeros(1, length, 1, 2, dtype=dtype)
    assert pad_keys(key, key)[0] is key


def test_padding_compiles_where_the_length_is_not_known():
    compiled = torch.compile(pad_keys, fullgraph=True, dynamic=True, backend="eager")
    for length in (385, 200, 600, 384):
        key = seeded_normal(1, length, 2, 8).to(torch.bfloat16)
        for one, other in zip(compiled(key, key), pad_keys(key, key), strict=True):
            assert one is other is None or torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("chosen", ["by a context", "for the layer"])
def test_backends_that_take_no_mask_get_none(chosen):
    attn, x = MAETokAttention(16, 2, 8).to(torch.bfloat16), seeded_normal(1, 200, 16).to(torch.bfloat16)
    expected = attn(x)
    if chosen == "for the layer":
        attn.processor._attention_backend = "_native_flash"
    context = attention_backend("_native_flash") if chosen == "by a context" else contextlib.nullcontext()
    with context:
        torch.testing.assert_close(attn(x), expected, atol=2e-2, rtol=2e-2)


@torch.no_grad()
def test_padding_hides_itself_from_attention():
    """In float32, where rounding does not hide a padding that takes part, through the processor."""
    attn, x = randomize_parameters(MAETokAttention(12, 3, 8)), seeded_normal(1, 200, 12)
    expected = attn(x)

    def padded(key, value):
        mask = torch.arange(224) < 200
        return *(F.pad(part, (0, 0, 0, 0, 0, 24)) for part in (key, value)), mask.view(1, 1, 1, -1)

    with patch("maetok_hf.models.layers.pad_keys", padded):
        torch.testing.assert_close(attn(x), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_attention_mask_hides_tokens():
    attn, x = randomize_parameters(MAETokAttention(12, 3, 4)), seeded_normal(2, 5, 12)
    visible = torch.tensor([True, True, True, False, False])
    torch.testing.assert_close(attn(x, visible.expand(2, 1, 5, 5))[:, :3], attn(x[:, :3]), atol=1e-5, rtol=1e-5)


def test_attention_has_diffusers_projection_names():
    attn = MAETokAttention(12, 3, 4)
    assert {name for name, _ in attn.named_parameters()} == {
        f"{name}.{kind}" for name in ("to_q", "to_k", "to_v", "to_out.0") for kind in ("weight", "bias")
    }
    assert attn.is_cross_attention is False


def test_layer_scale_and_drop_path():
    scale, x = LayerScale(4, 1e-5), seeded_normal(1000, 3, 4)
    assert torch.equal(scale(x), x * 1e-5)
    drop = DropPath(0.25)
    assert drop.eval()(x) is x
    torch.manual_seed(0)
    dropped = drop.train()(x)
    gone = (dropped == 0).flatten(1).all(1)
    torch.testing.assert_close(dropped[~gone], x[~gone] / 0.75)
    assert abs(gone.float().mean() - 0.25) < 0.05


@torch.no_grad()
def test_modulation_is_silu_then_linear():
    modulation, conditioning = randomize_parameters(Modulation(6, 4, 3)), seeded_normal(2, 6)
    terms = modulation(conditioning)
    assert [term.shape for term in terms] == [(2, 4)] * 3
    expected = F.linear(F.silu(conditioning), modulation.linear.weight, modulation.linear.bias)
    assert torch.equal(torch.cat(terms, -1), expected)


def test_only_the_latent_tokens_are_modulated():
    x, shift, scale = seeded_normal(2, 7, 4), seeded_normal(2, 3, 4, seed=1), seeded_normal(2, 3, 4, seed=2)
    changed = x.clone()
    output = modulate_latents(changed, shift, scale)
    assert output is changed
    assert torch.equal(output[:, :4], x[:, :4])
    assert torch.equal(output[:, 4:], x[:, 4:] * scale + shift)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@torch.no_grad()
def test_plain_block_matches_the_formula():
    block, x = randomize_parameters(TransformerBlock(12, 3, 4)), seeded_normal(2, 7, 12)
    assert [m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)] == [1e-6, 1e-6]
    fc1, fc2 = block.ff.net[0].proj, block.ff.net[2]
    h = x + block.scale1.gamma * reference_attention(block.attn, block.norm1(x))
    expected = h + block.scale2.gamma * fc2(F.gelu(fc1(block.norm2(h))))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_latent_modulated_block_matches_the_formula():
    block = randomize_parameters(TransformerBlock(12, 3, 4, modulation="latent", conditioning_dim=5))
    x, latent = seeded_normal(2, 7, 12), seeded_normal(2, 3, 5, seed=1)
    shift1, scale1, shift2, scale2 = block.modulation.linear(F.silu(latent)).chunk(4, dim=-1)

    def modulated(h, shift, scale):
        return torch.cat([norm(h)[:, :4], norm(h)[:, 4:] * scale + shift], dim=1)

    fc1, fc2 = block.ff.net[0].proj, block.ff.net[2]
    h = x + reference_attention(block.attn, modulated(x, shift1, scale1))
    expected = h + fc2(F.gelu(fc1(modulated(h, shift2, scale2))))
    torch.testing.assert_close(block(x, latent), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adaln_zero_block_matches_the_formula():
    block = randomize_parameters(
        TransformerBlock(12, 3, 4, activation_fn="gelu-approximate", modulation="adaln_zero", conditioning_dim=5)
    )
    x, conditioning = seeded_normal(2, 7, 12), seeded_normal(2, 5, seed=1)
    terms = block.modulation.linear(F.silu(conditioning)).unsqueeze(1).chunk(6, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = terms
    fc1, fc2 = block.ff.net[0].proj, block.ff.net[2]
    h = x + gate1 * reference_attention(block.attn, norm(x) * (1 + scale1) + shift1)
    expected = h + gate2 * fc2(F.gelu(fc1(norm(h) * (1 + scale2) + shift2), approximate="tanh"))
    torch.testing.assert_close(block(x, conditioning), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rms_norm_block_with_gated_mlp_matches_the_formula():
    block = randomize_parameters(
        TransformerBlock(
            12, 3, 4, activation_fn="swiglu", modulation="adaln_zero", conditioning_dim=5, norm_type="rms_norm",
            qk_norm=True,
        )
    )  # fmt: skip
    x, conditioning = seeded_normal(2, 7, 12), seeded_normal(2, 5, seed=1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (term.unsqueeze(1) for term in block.modulation(conditioning))

    def rms_norm(h, weight):
        return h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def mlp(h):
        value, gate = block.ff.net[0].proj(h).chunk(2, dim=-1)
        return block.ff.net[2](value * F.silu(gate))

    h = x + gate1 * reference_attention(block.attn, rms_norm(x, block.norm1.weight) * (1 + scale1) + shift1)
    expected = h + gate2 * mlp(rms_norm(h, block.norm2.weight) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, conditioning), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_block_with_skip_connection_merges_before_everything():
    block = randomize_parameters(TransformerBlock(12, 3, 4, layer_scale_init_value=None, skip_connection=True))
    x, skip = seeded_normal(2, 7, 12), seeded_normal(2, 7, 12, seed=1)
    merged = block.skip_proj(torch.cat([x, skip], dim=-1))
    h = merged + reference_attention(block.attn, block.norm1(merged))
    torch.testing.assert_close(block(x, skip=skip), h + block.ff(block.norm2(h)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1152, 3072), (1024, 2730)])
def test_gated_mlp_has_two_thirds_of_the_width_rounded_down(width, hidden):
    with torch.device("meta"):
        block = TransformerBlock(width, 1, width, activation_fn="swiglu")
    assert block.ff.net[0].proj.out_features == 2 * hidden and block.ff.net[2].in_features == hidden


@pytest.mark.parametrize(("width", "ratio", "hidden"), [(768, 4.0, 3072), (384, 1000 / 384, 1000), (768, 8 / 3, 2048)])
def test_mlp_width_is_the_ratio_times_the_width(width, ratio, hidden):
    with torch.device("meta"):
        assert TransformerBlock(width, 1, width, ratio).ff.net[0].proj.out_features == hidden


def test_blocks_differentiate_in_double_precision():
    block = randomize_parameters(TransformerBlock(4, 1, 4, modulation="latent", conditioning_dim=2)).double()
    inputs = [seeded_normal(1, 3, 4).double().requires_grad_(), seeded_normal(1, 2, 2).double().requires_grad_()]
    rotary_emb = tuple(table.double() for table in tables(3, 1, 2)[1])
    assert torch.autograd.gradcheck(lambda x, c: block(x, c, rotary_emb), inputs)
