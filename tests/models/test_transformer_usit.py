"""USiT: published parameter counts, skip connections, the two extra tokens."""

import pytest
import torch
from torch import nn

from maetok_hf import USiTTransformer1DModel
from tests.models.cases import TRANSFORMER_CASES
from tests.testing_utils import TRANSFORMER_CONFIG, seeded_normal


CASE = TRANSFORMER_CASES["usit"]
SIZE_2B = {"num_attention_heads": 32, "attention_head_dim": 64}


# published with DC-AE for its 256 latent tokens of 32 channels; MAETok's 128 tokens have fewer positions
@pytest.mark.parametrize(
    ("config", "sample_size", "millions"),
    [({}, 256, "500.87"), (SIZE_2B, 256, "1580.40"), ({}, 128, "500.72"), (SIZE_2B, 128, "1580.13")],
)
def test_published_sizes(config, sample_size, millions):
    with torch.device("meta"):
        model = USiTTransformer1DModel(sample_size=sample_size, **config)
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}" == millions
    assert "| 501 M |" in model.__doc__ and "| 1.58 B |" in model.__doc__


def test_only_the_way_out_has_skip_connections():
    model = CASE.build(num_layers=7)
    assert [block.skip_proj is not None for block in model.transformer_blocks] == [False] * 4 + [True] * 3


def test_blocks_have_no_biases_in_their_queries_and_no_layer_scale():
    names = [name for name, _ in CASE.build().named_parameters()]
    assert not any(f"to_{kind}.bias" in name for name in names for kind in "qkv")
    assert any("to_out.0.bias" in name for name in names)
    assert not any("scale" in name for name in names)


def test_each_skip_comes_from_the_mirrored_block():
    model, outputs, skips = CASE.build(num_layers=7), {}, {}
    for index, block in enumerate(model.transformer_blocks):
        block.register_forward_hook(lambda module, args, output, index=index: outputs.update({index: output}))
        block.register_forward_pre_hook(lambda module, args, index=index: skips.update({index: args[3]}))
    CASE.run(model)
    assert [skips[index] for index in range(4)] == [None] * 4
    for index in (4, 5, 6):
        assert skips[index] is outputs[6 - index]


@pytest.mark.parametrize("index", [3, 4])
def test_every_skip_connection_is_used(index):
    model = CASE.build(num_layers=5)
    expected = CASE.run(model)
    skip_proj = model.transformer_blocks[index].skip_proj
    with torch.no_grad():
        skip_proj.weight[:, skip_proj.in_features // 2 :] = 0  # the half that reads the skipped tokens
    assert not torch.allclose(CASE.run(model), expected, atol=1e-3)


def test_class_and_time_are_tokens_before_the_latents():
    model, seen = CASE.build(temperature_embedding=False), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = {**CASE.inputs(), "guidance_temperature": None}
    with torch.no_grad():
        model(**inputs)
        tokens = seen[0] - model.pos_embed
        torch.testing.assert_close(tokens[:, 0], model.class_embed(inputs["class_labels"]))
        angles = inputs["timestep"].unsqueeze(1) * 10000 ** (-torch.arange(16) / 16)
        torch.testing.assert_close(tokens[:, 1], torch.cat([angles.cos(), angles.sin()], dim=1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(tokens[:, 2:], model.proj_in(inputs["hidden_states"]))


def test_the_temperature_is_added_to_the_time_token_only():
    model, seen = CASE.build(), []
    model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    CASE.run(model)
    with torch.no_grad():
        model(**{**CASE.inputs(), "guidance_temperature": torch.tensor([0.7, 0.2])})
    changed = (seen[0] != seen[1]).any(-1).any(0)
    assert changed.nonzero().flatten().tolist() == [1]


def test_output_is_of_the_latent_tokens():
    """The last block's class and time tokens have no way to the output."""
    model = CASE.build()
    expected = CASE.run(model)

    def spoil(module, args, output):
        return torch.cat([seeded_normal(2, 2, 32, seed=5), output[:, 2:]], dim=1)

    model.transformer_blocks[-1].register_forward_hook(spoil)
    assert torch.equal(CASE.run(model), expected)


def test_initialisation_is_that_of_u_vit():
    model = CASE.fresh(num_attention_heads=4, temperature_embedding=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std() - 0.02) < 0.003, name
            assert module.bias is None or module.bias.abs().max() == 0, name
    assert abs(model.pos_embed.std() - 0.02) < 0.003
    assert abs(model.class_embed.weight.std() - 1) < 0.1
    assert not any(block.norm1.eps != 1e-5 for block in model.transformer_blocks)


@pytest.mark.parametrize("num_layers", [1, 2, 4, 28])
def test_a_stack_without_a_middle_is_refused(num_layers):
    with pytest.raises(ValueError, match=f"`num_layers` must be odd and at least 3 .* got {num_layers}"):
        USiTTransformer1DModel(**{**TRANSFORMER_CONFIG, "num_layers": num_layers})
