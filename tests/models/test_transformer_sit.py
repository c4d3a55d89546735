"""The generator: parity with the authors' code, the null class, initialisation, sizes, errors."""

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf import SiTTransformer1DModel, convert_transformer
from maetok_hf.models.embeddings import sincos_position_embedding
from tests.testing_utils import GOLDEN, MODEL_CASES, TRANSFORMER_CONFIG, seeded_normal, tiny_transformer


CASE = MODEL_CASES["sit"]
# (config, parameters in millions as published: DiT table 4 and SiT; MAETok's latents have 32 channels)
SIZES = {
    "S": ({"num_layers": 12, "num_attention_heads": 6, "attention_head_dim": 64}, 33),
    "B": ({"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64}, 130),
    "L": ({"num_layers": 24, "num_attention_heads": 16, "attention_head_dim": 64}, 458),
    "XL": ({}, 675),
}


def run(model, labels=(1, 2), **kwargs):
    inputs = {**CASE.inputs(), "class_labels": torch.tensor(labels)}
    with torch.no_grad():
        return model(**inputs, **kwargs).sample


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


def test_token_order_matters():
    model, inputs = tiny_transformer(), CASE.inputs()
    flipped = {**inputs, "hidden_states": inputs["hidden_states"].flip(1)}
    with torch.no_grad():
        assert not torch.allclose(model(**flipped).sample.flip(1), model(**inputs).sample, atol=1e-3)


def test_timestep_and_class_reach_the_output():
    model, inputs = tiny_transformer(), CASE.inputs()
    with torch.no_grad():
        output = model(**inputs).sample
        for name, value in (("timestep", torch.tensor([0.11, 0.9])), ("class_labels", torch.tensor([1, 10]))):
            changed = model(**{**inputs, name: value}).sample
            assert not torch.equal(changed[0], output[0])
            torch.testing.assert_close(changed[1], output[1], atol=1e-5, rtol=1e-5)


def test_integer_and_float64_timesteps_are_taken():
    model, inputs = tiny_transformer(), CASE.inputs()
    with torch.no_grad():
        outputs = [
            model(**{**inputs, "timestep": torch.tensor([0, 1]).to(dtype)}).sample
            for dtype in (torch.float32, torch.int64, torch.float64)
        ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_null_class_is_the_one_after_the_last():
    model = tiny_transformer()
    assert model.class_embed.num_embeddings == model.config.num_classes + 1
    everything = torch.tensor([True, True])
    assert torch.equal(run(model, (1, 2), class_drop_mask=everything), run(model, (10, 10)))
    with pytest.raises(IndexError):
        run(model, (11, 0))


def test_labels_are_dropped_in_training_only():
    model = tiny_transformer(class_dropout_prob=1.0)
    assert torch.equal(run(model.train(), (1, 2)), run(model.eval(), (10, 10)))
    assert torch.equal(run(model.eval(), (1, 2)), run(tiny_transformer(), (1, 2)))
    keep = tiny_transformer(class_dropout_prob=0.0)
    assert torch.equal(run(keep.train(), (1, 2)), run(keep.eval(), (1, 2)))


def test_labels_are_dropped_with_the_stated_probability():
    model = tiny_transformer(class_dropout_prob=0.3).train()
    torch.manual_seed(0)
    labels = model._drop_classes(torch.zeros(20000, dtype=torch.long), None)
    assert set(labels.tolist()) == {0, 10}
    assert abs((labels == 10).float().mean() - 0.3) < 0.015


@pytest.mark.parametrize("training", [False, True])
def test_a_given_drop_mask_is_respected_and_nothing_is_drawn(training):
    model = tiny_transformer(class_dropout_prob=1.0).train(training)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    output = run(model, (1, 2), class_drop_mask=torch.tensor([False, True]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output, run(model.eval(), (1, 10)))


def test_a_batch_may_mix_times_and_classes():
    """Every conditioning vector belongs to its own sample: swapping samples swaps outputs."""
    model, inputs = tiny_transformer(), CASE.inputs()
    with torch.no_grad():
        swapped = model(**{name: value.flip(0) for name, value in inputs.items()}).sample
        torch.testing.assert_close(swapped.flip(0), model(**inputs).sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sample_size": 0}, "`sample_size` must be positive, got 0"),
        ({"in_channels": 0}, "`in_channels`"),
        ({"num_layers": 0}, "`num_layers`"),
        ({"num_attention_heads": 0}, "`num_attention_heads`"),
        ({"attention_head_dim": -1}, "`attention_head_dim`"),
        ({"mlp_ratio": 0.0}, "`mlp_ratio`"),
        ({"num_classes": 0}, "`num_classes`"),
        ({"num_attention_heads": 3, "attention_head_dim": 5}, "even.*3 \\* 5 = 15"),
        ({"class_dropout_prob": 1.5}, r"`class_dropout_prob` must lie in \[0, 1\], got 1.5"),
        ({"class_dropout_prob": -0.1}, "`class_dropout_prob`"),
        ({"path": "gvp"}, "`path` must be 'linear' or 'cosine', got 'gvp'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer1DModel(**{**TRANSFORMER_CONFIG, **config})


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 6, 5), (6, 4), (2, 4, 6)])
def test_latents_of_the_wrong_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 6, 4\)"):
        tiny_transformer()(seeded_normal(*shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("timestep", "class_labels"),
    [(torch.tensor(0.5), torch.zeros(2)), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), torch.zeros(1))],
)
def test_there_is_one_time_and_one_label_per_sample(timestep, class_labels):
    with pytest.raises(ValueError, match=r"`timestep` and `class_labels` must have shape \(batch,\) = \(2,\)"):
        tiny_transformer()(seeded_normal(2, 6, 4), timestep, class_labels.long())
