"""LightningDiT: sizes, initialisation, its parts, rotary positions."""

from unittest.mock import patch

import pytest
import torch
from diffusers.models.activations import SwiGLU
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maetok_hf import LightningDiTTransformer1DModel
from maetok_hf.models.embeddings import rotary_tables
from maetok_hf.models.layers import RMSNorm
from tests.models.cases import TRANSFORMER_CASES
from tests.testing_utils import TRANSFORMER_CONFIG


CASE = TRANSFORMER_CASES["lightning_dit"]
# XL as MAETok's comparison states it, B as computed; SwiGLU's two thirds keep SiT's counts
SIZES = {
    "B": ({"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}, 130),
    "XL": ({}, 675),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    config, millions = SIZES[size]
    with torch.device("meta"):
        model = LightningDiTTransformer1DModel(**config)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.005 * millions
    assert f"| {size} " in model.__doc__ and f"{millions} M" in model.__doc__


def test_fresh_model_predicts_zero():
    model = CASE.fresh()
    assert torch.equal(CASE.run(model.eval()), torch.zeros(2, 6, 4))
    norms = [p for name, p in model.named_parameters() if "norm" in name and p.ndim == 1 and "modulation" not in name]
    assert len(norms) == 2 * 4 + 1 and all((p == 1).all() for p in norms)


def test_norms_are_rms_norms_and_mlps_are_gated():
    model = CASE.build()
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    assert sum(isinstance(module, RMSNorm) for module in model.modules()) == 2 * 4 + 1
    gates = [module for module in model.modules() if isinstance(module, SwiGLU)]
    assert [gate.proj.out_features for gate in gates] == [2 * int(2 / 3 * 4 * 32)] * 2


def test_queries_are_normalised_only_on_request():
    plain = CASE.build(qk_norm=False)
    assert not any("norm_q" in name or "norm_k" in name for name in plain.state_dict())
    assert "transformer_blocks.0.attn.norm_q.weight" in CASE.build().state_dict()


def test_every_block_rotates_by_the_token_index():
    model, seen = CASE.build(), []
    for block in model.transformer_blocks:
        block.attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["rotary_emb"]), with_kwargs=True
        )
    CASE.run(model)
    expected = rotary_tables(6, 16, torch.device("cpu"))
    assert len(seen) == 2
    for tables in seen:
        assert all(torch.equal(got, table) for got, table in zip(tables, expected, strict=True))


def test_rotary_positions_alone_tell_tokens_apart():
    model, inputs = CASE.build(), CASE.inputs()
    model.pos_embed.zero_()
    flipped = {**inputs, "hidden_states": inputs["hidden_states"].flip(1)}
    with torch.no_grad():
        assert not torch.allclose(model(**flipped).sample.flip(1), model(**inputs).sample, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_angles_are_float32_at_least_whatever_the_dtype_of_the_model(dtype):
    model = CASE.build().to(dtype)
    cos, sin = model._rotary_emb(CASE.inputs(dtype=dtype)["hidden_states"])
    assert cos.dtype == sin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="`attention_head_dim` must be even.* got 5"):
        LightningDiTTransformer1DModel(**{**TRANSFORMER_CONFIG, "attention_head_dim": 5})


def test_rotary_tables_are_made_once_and_serve_gradients_after_inference_and_other_dtypes():
    model = CASE.build()
    calls = []

    def counted(*args):
        calls.append(args)
        return rotary_tables(*args)

    inputs = CASE.inputs()
    with patch("maetok_hf.models.transformer_lightning_dit.rotary_tables", counted):
        with torch.inference_mode():
            expected = model(**inputs).sample
        output = model(**inputs).sample
        output.sum().backward()
        assert torch.equal(output, expected)
        assert len(calls) == 1
        model.double()(**{**inputs, "hidden_states": inputs["hidden_states"].double()})
        model.float()(**inputs)
    assert len(calls) == 2


def test_a_pass_that_computes_shapes_only_leaves_no_tables():
    model, fake = CASE.build(), FakeTensorMode(allow_non_fake_inputs=True)
    expected = CASE.build()(**CASE.inputs()).sample
    with fake:
        assert model(**CASE.inputs()).sample.shape == expected.shape
    assert torch.equal(model(**CASE.inputs()).sample, expected)
