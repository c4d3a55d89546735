"""Laws of all generators: null class, label dropping, guidance temperature, new classes, errors."""

import json

import pytest
import torch
from peft import LoraConfig

from tests.models.cases import TRANSFORMER_CASES
from tests.testing_utils import TRANSFORMER_CONFIG, randomize_parameters, seeded_normal


@pytest.fixture(params=TRANSFORMER_CASES.values(), ids=TRANSFORMER_CASES.keys())
def case(request):
    return request.param


def run(case, model, labels=(1, 2), **kwargs):
    with torch.no_grad():
        return model(**{**case.inputs(), "class_labels": torch.tensor(labels), **kwargs}).sample


def plain(case):
    """A trained model without a temperature embedding, and its inputs."""
    inputs = case.inputs()
    inputs.pop("guidance_temperature", None)
    return case.build(temperature_embedding=False), inputs


# Conditioning


def test_token_order_matters(case):
    model, inputs = case.build(), case.inputs()
    flipped = {**inputs, "hidden_states": inputs["hidden_states"].flip(1)}
    with torch.no_grad():
        assert not torch.allclose(model(**flipped).sample.flip(1), model(**inputs).sample, atol=1e-3)


def test_every_condition_reaches_the_output_of_its_own_sample(case):
    model, inputs = case.build(), case.inputs()
    changes = {"timestep": torch.tensor([0.2, 0.9]), "class_labels": torch.tensor([1, 10])}
    if "guidance_temperature" in inputs:
        changes["guidance_temperature"] = torch.tensor([0.9, 1.0])
    with torch.no_grad():
        output = model(**inputs).sample
        for name, value in changes.items():
            changed = model(**{**inputs, name: value}).sample
            assert not torch.allclose(changed[0], output[0], atol=1e-4), name
            torch.testing.assert_close(changed[1], output[1], atol=1e-5, rtol=1e-5)


def test_a_batch_may_mix_times_and_classes(case):
    """Every conditioning vector belongs to its own sample: swapping samples swaps outputs."""
    model, inputs = case.build(), case.inputs()
    with torch.no_grad():
        swapped = model(**{name: value.flip(0) for name, value in inputs.items()}).sample
        torch.testing.assert_close(swapped.flip(0), model(**inputs).sample, atol=1e-5, rtol=1e-5)


def test_integer_and_float64_timesteps_are_taken(case):
    model = case.build()
    outputs = [
        run(case, model, timestep=torch.tensor([0, 1]).to(dtype))
        for dtype in (torch.float32, torch.int64, torch.float64)
    ]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_null_class_is_the_one_after_the_last(case):
    model = case.build()
    assert model.class_embed.num_embeddings == model.config.num_classes + 1
    everything = torch.tensor([True, True])
    assert torch.equal(run(case, model, (1, 2), class_drop_mask=everything), run(case, model, (10, 10)))
    with pytest.raises(IndexError):
        run(case, model, (11, 0))


def test_labels_are_dropped_in_training_only(case):
    model = case.build(class_dropout_prob=1.0)
    assert torch.equal(run(case, model.train(), (1, 2)), run(case, model.eval(), (10, 10)))
    assert torch.equal(run(case, model.eval(), (1, 2)), run(case, case.build(), (1, 2)))
    keep = case.build(class_dropout_prob=0.0)
    assert torch.equal(run(case, keep.train(), (1, 2)), run(case, keep.eval(), (1, 2)))


def test_labels_are_dropped_with_the_stated_probability(case):
    model = case.build(class_dropout_prob=0.3).train()
    torch.manual_seed(0)
    labels = model._drop_classes(torch.zeros(20000, dtype=torch.long), None)
    assert set(labels.tolist()) == {0, 10}
    assert abs((labels == 10).float().mean() - 0.3) < 0.015


@pytest.mark.parametrize("training", [False, True])
def test_a_given_drop_mask_is_respected_and_nothing_is_drawn(case, training):
    model = case.build(class_dropout_prob=1.0).train(training)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    output = run(case, model, (1, 2), class_drop_mask=torch.tensor([False, True]))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output, run(case, model.eval(), (1, 10)))


def test_gradients_reach_every_parameter(case):
    model, inputs = case.build(), case.inputs(batch_size=11)  # all classes and the null class
    output = model(**inputs).sample
    torch.nn.functional.mse_loss(output, seeded_normal(*output.shape, seed=1)).backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad.abs().flatten(1).amax(1) if name == "pos_embed" else parameter.grad.abs().amax()
        # a bias of the keys adds the same number to all logits of a query, unless keys are rotated
        without_effect = name.endswith("to_k.bias") and not model.config.get("qk_norm")
        assert reached.max() < 1e-7 if without_effect else reached.min() > 1e-7, name


# Guidance temperature


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enabling_the_temperature_changes_no_output_at_any_temperature(case, dtype):
    model, inputs = plain(case)
    model.to(dtype)
    inputs["hidden_states"] = inputs["hidden_states"].to(dtype)
    with torch.no_grad():
        expected = model(**inputs).sample
        model.enable_temperature_embedding()
        assert model.config.temperature_embedding is True
        assert {p.dtype for p in model.parameters()} == {dtype}
        for temperature in (None, 1.0, 0.5, 0.1, 1e-3):
            beta = temperature if temperature is None else torch.full((2,), temperature)
            assert torch.equal(model(**inputs, guidance_temperature=beta).sample, expected)


def test_enabling_the_temperature_twice_keeps_what_was_learned(case):
    model, _ = plain(case)
    model.enable_temperature_embedding()
    randomize_parameters(model, seed=1)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.enable_temperature_embedding()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_new_model_with_temperature_has_the_weights_of_one_without(case):
    without, with_temperature = case.fresh(temperature_embedding=False), case.fresh(temperature_embedding=True)
    expected, got = without.state_dict(), with_temperature.state_dict()
    assert set(got) - set(expected) == {
        f"temperature_embed.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert got["temperature_embed.linear_1.weight"].std() > 0.01
    for name in ("linear_1.bias", "linear_2.weight", "linear_2.bias"):
        assert got[f"temperature_embed.{name}"].abs().max() == 0


def test_no_temperature_means_temperature_one(case):
    model = case.build(temperature_embedding=True)
    output = run(case, model, guidance_temperature=None)
    assert torch.equal(output, run(case, model, guidance_temperature=torch.ones(2)))
    assert torch.equal(output, run(case, model, guidance_temperature=None, timestep=torch.tensor([0.1, 0.9])))
    assert not torch.allclose(output, run(case, model, guidance_temperature=torch.full((2,), 0.5)), atol=1e-4)


def test_the_temperature_is_embedded_as_a_time_is(case):
    model, seen = case.build(temperature_embedding=True), []
    model.temperature_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    beta = torch.tensor([0.25, 1.0])
    run(case, model, guidance_temperature=beta)
    half = model.time_proj.num_channels // 2
    angles = beta.unsqueeze(1) * 10000 ** (-torch.arange(half) / half)
    torch.testing.assert_close(seen[0], torch.cat([angles.cos(), angles.sin()], dim=1))


def test_the_temperature_learns_from_zero(case):
    model, inputs = plain(case)
    model.enable_temperature_embedding()
    model(**inputs, guidance_temperature=torch.tensor([0.2, 0.8])).sample.square().mean().backward()
    assert model.temperature_embed.linear_2.weight.grad.abs().max() > 0
    with torch.no_grad():
        for parameter in model.temperature_embed.parameters():
            parameter -= 0.1 * parameter.grad.sign()
        low, high = (model(**inputs, guidance_temperature=torch.full((2,), beta)).sample for beta in (0.2, 0.8))
    assert not torch.allclose(low, high, atol=1e-5)


def test_a_model_with_enabled_temperature_is_saved_and_loaded(case, tmp_path):
    model, _ = plain(case)
    model.enable_temperature_embedding()
    randomize_parameters(model, seed=1)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    beta = torch.tensor([0.2, 0.8])
    assert torch.equal(
        run(case, loaded, guidance_temperature=beta), run(case, model, guidance_temperature=beta)
    )  # fmt: skip


def test_a_file_from_before_the_option_loads_as_before(case, tmp_path):
    model, inputs = plain(case)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["temperature_embedding"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = case.model_class.from_pretrained(tmp_path)
    assert loaded.temperature_embed is None and loaded.config.temperature_embedding is False
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)


def test_a_temperature_for_a_model_without_one_is_refused(case):
    model, inputs = plain(case)
    with pytest.raises(ValueError, match=r"without a temperature embedding.*`enable_temperature_embedding\(\)`"):
        model(**inputs, guidance_temperature=torch.ones(2))


@pytest.mark.parametrize("beta", [torch.tensor(0.5), torch.ones(3), torch.ones(2, 1)])
def test_there_is_one_temperature_per_sample(case, beta):
    with pytest.raises(ValueError, match=r"`guidance_temperature` must have shape \(batch,\) = \(2,\)"):
        run(case, case.build(temperature_embedding=True), guidance_temperature=beta)


# New classes


def test_added_classes_leave_old_classes_and_the_null_class_alone(case):
    model, expected = case.build(), case.build()
    model.add_classes(3)
    assert model.config.num_classes == 13 and model.class_embed.num_embeddings == 14
    assert torch.equal(run(case, model, (0, 9)), run(case, expected, (0, 9)))
    assert torch.equal(run(case, model, (4, 13)), run(case, expected, (4, 10)))
    dropped = torch.tensor([False, True])
    assert torch.equal(
        run(case, model, (12, 0), class_drop_mask=dropped)[1], run(case, expected, (10, 10))[1]
    )  # fmt: skip
    with pytest.raises(IndexError):
        run(case, model, (14, 0))


def test_added_classes_start_as_the_mean_of_the_old_ones(case):
    model = case.build()
    mean = model.class_embed.weight[:10].mean(0)
    model.add_classes(2)
    torch.testing.assert_close(model.class_embed.weight[10:12], mean.expand(2, -1))


def test_added_classes_are_saved_and_trained(case, tmp_path):
    model = case.build()
    model.add_classes(1)
    model.add_classes(1)
    model.save_pretrained(tmp_path)
    loaded = case.model_class.from_pretrained(tmp_path)
    assert loaded.config.num_classes == 12
    assert torch.equal(run(case, loaded, (11, 12)), run(case, model, (11, 12)))
    loaded(**{**case.inputs(), "class_labels": torch.tensor([11, 11])}).sample.square().mean().backward()
    touched = loaded.class_embed.weight.grad.abs().amax(1) > 0
    assert touched.nonzero().flatten().tolist() == [11]


def test_adding_classes_keeps_precision_and_whether_the_table_trains(case):
    model = case.build().to(torch.bfloat16)
    model.requires_grad_(False)
    table = model.class_embed
    model.add_classes(2)
    assert model.class_embed is table
    assert table.weight.dtype == torch.bfloat16 and not table.weight.requires_grad


@pytest.mark.parametrize("count", [0, -2])
def test_adding_no_classes_is_refused(case, count):
    with pytest.raises(ValueError, match=f"`count` must be .* at least 1, got {count}"):
        case.build().add_classes(count)


def test_classes_must_be_added_before_an_adapter_of_the_table(case):
    model = case.build()
    model.add_adapter(LoraConfig(target_modules=["class_embed"]))
    with pytest.raises(ValueError, match="before adding the adapter"):
        model.add_classes(1)


# Errors


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
def test_bad_configs_are_refused(case, config, message):
    with pytest.raises(ValueError, match=message):
        case.model_class(**{**TRANSFORMER_CONFIG, **config})


@pytest.mark.parametrize("shape", [(2, 7, 4), (2, 6, 5), (6, 4), (2, 4, 6)])
def test_latents_of_the_wrong_shape_are_refused(case, shape):
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape \(batch, 6, 4\)"):
        case.build()(seeded_normal(*shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("timestep", "class_labels"),
    [(torch.tensor(0.5), torch.zeros(2)), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), torch.zeros(1))],
)
def test_there_is_one_time_and_one_label_per_sample(case, timestep, class_labels):
    with pytest.raises(ValueError, match=r"`timestep` and `class_labels` must have shape \(batch,\) = \(2,\)"):
        case.build()(seeded_normal(2, 6, 4), timestep, class_labels.long())


def test_what_the_blocks_add_is_summed_in_float32_under_autocast(case):
    model, dtypes = case.build(), []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        case.run(model)
    assert dtypes == [torch.float32] * len(model.transformer_blocks)


def test_classes_cannot_be_added_to_weights_that_are_elsewhere(case):
    model = case.build()
    model.class_embed.to("meta")
    with pytest.raises(ValueError, match="before `enable_sequential_cpu_offload`"):
        model.add_classes(1)
