"""SiT: parity with the authors' code, initialisation, sizes, positions."""

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf import SiTTransformer1DModel, convert_transformer
from maetok_hf.models.embeddings import sincos_position_embedding
from tests.models.cases import MODEL_CASES
from tests.testing_utils import GOLDEN, TRANSFORMER_CONFIG, tiny_transformer


CASE = MODEL_CASES["sit"]
# (config, parameters in millions as published: DiT table 4 and SiT; MAETok's latents have 32 channels)
SIZES = {
    "S": ({"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}, 33),
    "B": ({"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}, 130),
    "L": ({"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64}, 458),
    "XL": ({}, 675),
}


def test_velocities_match_golden():
    model, golden = convert_transformer(GOLDEN / "sit"), load_file(GOLDEN / "sit" / "io.safetensors")
    null = torch.full_like(golden["class_labels"], model.config.num_classes)
    with torch.no_grad():
        for labels, expected in ((golden["class_labels"], "velocity"), (null, "velocity_null_class")):
            velocity = model(golden["sample"], golden["timestep"], labels).sample
            assert (velocity - golden[expected]).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size):
    config, millions = SIZES[size]
    with torch.device("meta"):
        model = SiTTransformer1DModel(**config)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 0.01 * millions
    assert f"| {size} " in SiTTransformer1DModel.__doc__ and f"{millions} M" in SiTTransformer1DModel.__doc__


def test_fresh_model_predicts_zero():
    """adaLN-Zero: the residual branches and the last layer start at zero, and everything learns from there."""
    torch.manual_seed(0)
    model = SiTTransformer1DModel(**TRANSFORMER_CONFIG)
    assert torch.equal(model(**CASE.inputs()).sample, torch.zeros(2, 6, 4))
    zero = {name for name, p in model.named_parameters() if p.abs().max() == 0}
    weights = {name for name in zero if name.endswith("weight")}
    assert weights == {
        "proj_out.weight",
        "norm_out_modulation.linear.weight",
        *(f"transformer_blocks.{i}.modulation.linear.weight" for i in range(2)),
    }
    assert all(name in zero for name, _ in model.named_parameters() if name.endswith("bias"))
    assert abs(model.class_embed.weight.std() - 0.02) < 0.005
    assert abs(model.time_embed.linear_1.weight.std() - 0.02) < 0.002
    # Xavier: query, key and value as separate square matrices
    bound = (6 / 64) ** 0.5
    assert 0.9 * bound < model.transformer_blocks[0].attn.to_q.weight.abs().max() <= bound


def test_positions_are_the_fixed_table():
    model = tiny_transformer()
    assert torch.equal(model.pos_embed, sincos_position_embedding(6, 32))
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
