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


@pytest.mark.parametrize("length", [193, 385, 511])
def test_padded_keys_change_nothing_and_pad_to_fast_lengths(length):
    query, key, value = (seeded_normal(1, length, 2, 8, seed=seed).to(torch.bfloat16) for seed in range(3))
    padded_key, padded_value, mask = pad_keys(key, value)
    assert padded_key.shape == padded_value.shape == (1, length + -length % 32, 2, 8)
    assert mask.sum() == length and mask[..., :length].all()

    def attention(key, value, mask):
        heads_first = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask)

    torch.testing.assert_close(
        attention(padded_key, padded_value, mask), attention(key, value, None), atol=2e-2, rtol=2e-2
    )


NOT_PADDED = (191, 192, 208, 257, 353, 384, 400, 417, 451, 513)


@pytest.mark.parametrize(
    ("length", "dtype"), [(385, torch.float32), *((length, torch.bfloat16) for length in NOT_PADDED)]
)
def test_keys_are_not_padded_where_that_gains_nothing(length, dtype):
    key, value = torch.zeros(2, 1, length, 1, 2, dtype=dtype)
    padded_key, padded_value, mask = pad_keys(key, value)
    assert padded_key is key and padded_value is value and mask is None


def test_padding_compiles_where_the_length_is_not_known():
    compiled = torch.compile(pad_keys, fullgraph=True, dynamic=True, backend="eager")
    for length in (385, 200, 600, 384, 417):
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


@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_latent_tokens_are_modulated(in_place):
    x, shift, scale = seeded_normal(2, 7, 4), seeded_normal(2, 3, 4, seed=1), seeded_normal(2, 3, 4, seed=2)
    changed = x.clone()
    output = modulate_latents(changed, shift, scale, in_place)
    assert (output is changed) == in_place and torch.equal(changed, x) != in_place
    assert torch.equal(output[:, :4], x[:, :4])
    assert torch.equal(output[:, 4:], x[:, 4:] * scale + shift)


def test_modulation_keeps_no_more_than_the_latents_for_the_backward_pass():
    tokens, kept = seeded_normal(2, 50, 4).requires_grad_() * 1, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    shift, scale = seeded_normal(2, 3, 4).requires_grad_(), seeded_normal(2, 3, 4, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        modulate_latents(tokens, shift, scale)
    assert kept and max(kept.values()) == 4 * shift.numel()


def modulated_block():
    return randomize_parameters(TransformerBlock(12, 3, 4, modulation="latent", conditioning_dim=2)).eval()


@torch.no_grad()
def test_latents_are_modulated_in_place_only_where_nobody_sees_it():
    block, x, latent = modulated_block(), seeded_normal(2, 7, 12), seeded_normal(2, 3, 2, seed=1)
    expected, asked = block(x, latent), []

    def record(hidden_states, shift, scale, in_place=False):
        asked.append(in_place)
        return modulate_latents(hidden_states, shift, scale, in_place)

    def seen():
        asked.clear()
        assert torch.equal(block(x, latent), expected)
        return [not in_place for in_place in asked]

    with patch("maetok_hf.models.layers.modulate_latents", record):
        assert seen() == [False, False]
        with torch.enable_grad():
            assert seen() == [True, True]
        hook = block.norm2.register_forward_hook(lambda module, args, output: None)
        assert seen() == [False, True]
        hook.remove()
        hook = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
        assert seen() == [True, True]
        hook.remove()
        block.norm1.forward = block.norm1.forward
        assert seen() == [True, False]


def test_norms_that_are_taken_out_leave_the_residual_alone():
    block, x, latent = modulated_block(), seeded_normal(2, 7, 12), seeded_normal(2, 3, 2, seed=1)
    block.norm1 = block.norm2 = nn.Identity()
    expected, given = block(x, latent), x.clone()
    with torch.no_grad():
        assert torch.equal(block(x, latent), expected)
    assert torch.equal(x, given)


@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_forward_hook_keeps_does_not_change(gradients):
    block, x, kept = modulated_block(), seeded_normal(2, 7, 12), []
    for norm_ in (block.norm1, block.norm2):
        norm_.register_forward_hook(lambda module, args, output: kept.append((output, output.clone())))
    with torch.set_grad_enabled(gradients):
        block(x, seeded_normal(2, 3, 2, seed=1))
    assert len(kept) == 2 and all(torch.equal(output, copy) for output, copy in kept)


def test_full_backward_hooks_see_gradients_and_change_none():
    block, x = modulated_block(), seeded_normal(2, 7, 12).requires_grad_()
    latent = seeded_normal(2, 3, 2, seed=1).requires_grad_()
    inputs, found, called = [x, latent, *block.parameters()], [], set()
    for hooked in (False, True):
        if hooked:
            for name, module in block.named_modules():
                if not isinstance(module, nn.ModuleList):  # which is never called
                    module.register_full_backward_hook(lambda module, *_, name=name: called.add(name))
        found.append(torch.autograd.grad(block(x, latent).square().sum(), inputs))
    assert {"norm1", "norm2", "attn", "ff", "modulation"} <= called
    for plain, hooked in zip(*found, strict=True):
        assert torch.equal(hooked, plain)


@pytest.mark.parametrize("gradients", [False, True])
def test_blocks_of_a_batch_are_the_blocks_of_its_members(gradients):
    block, x, latent = modulated_block(), seeded_normal(2, 7, 12), seeded_normal(3, 2, 3, 2, seed=1)
    with torch.set_grad_enabled(gradients):
        batched = torch.func.vmap(lambda conditioning: block(x, conditioning))(latent)
        members = torch.stack([block(x, conditioning) for conditioning in latent])
    torch.testing.assert_close(batched, members, atol=1e-5, rtol=1e-5)


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
