import math

import pytest
import torch
from torch import nn

from maetok_hf.models.autoencoder_mae import AutoencoderMAE
from maetok_hf.models.transformer_sit import SiTTransformer1DModel
from maetok_hf.training.optim import (
    clip_gradients,
    create_ema,
    learning_rate_at,
    scale_learning_rate,
    set_learning_rate,
    weight_decay_groups,
)


def tiny_tokenizer(**kwargs):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 4, "latent_channels": 4, "num_latent_tokens": 3}
    return AutoencoderMAE(**sizes, hidden_size=16, num_layers=1, num_attention_heads=2, **kwargs)


def tiny_transformer():
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    return SiTTransformer1DModel(num_classes=5, **sizes)


@pytest.mark.parametrize(
    "model",
    [
        tiny_tokenizer(),
        tiny_tokenizer(modulated_decoder=True),
        tiny_tokenizer(position_embedding="absolute"),
        tiny_transformer(),
    ],
)
def test_only_the_matrices_of_layers_decay(model):
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, undecayed = weight_decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and undecayed["weight_decay"] == 0.0
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert set(decayed["params"]) == {layer.weight for layer in layers}
    assert sorted(names[parameter] for group in (decayed, undecayed) for parameter in group["params"]) == sorted(
        names.values()
    )


def test_tokens_positions_frequencies_norms_and_biases_do_not_decay():
    model = tiny_tokenizer(position_embedding="rope")
    names = {parameter: name for name, parameter in model.named_parameters()}
    undecayed = " ".join(names[parameter] for parameter in weight_decay_groups(model, 0.1)[1]["params"])
    for part in ("mask_token", "class_token", "latent_tokens", "latent_pos_embed", "pos_embed", "freqs", "gamma"):
        assert part in undecayed
    assert "norm1.weight" in undecayed and "to_q.bias" in undecayed and "to_q.weight" not in undecayed


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out():
    model = tiny_tokenizer()
    model.encoder.requires_grad_(False)
    parameters = [parameter for group in weight_decay_groups(model, 0.1) for parameter in group["params"]]
    assert set(parameters) == set(model.decoder.parameters())
    (group,) = weight_decay_groups(nn.Linear(2, 2, bias=False), 0.1)
    assert group["weight_decay"] == 0.1
    with pytest.raises(ValueError, match="no trainable parameter"):
        weight_decay_groups(model.encoder, 0.1)
    with pytest.raises(ValueError, match="`weight_decay`"):
        weight_decay_groups(model, -0.1)


def test_a_shared_parameter_is_listed_once():
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    layers[1].weight = layers[0].weight
    assert [len(group["params"]) for group in weight_decay_groups(layers, 0.1)] == [1, 2]


def test_a_step_without_gradient_only_shrinks_what_decays():
    model = tiny_tokenizer()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups = weight_decay_groups(model, 0.5)
    torch.optim.AdamW(groups, lr=0.1).step()
    decayed = {id(parameter) for parameter in groups[0]["params"]}
    for name, parameter in model.named_parameters():
        expected = before[name] * 0.95 if id(parameter) in decayed else before[name]
        assert torch.allclose(parameter, expected, rtol=1e-5), name


def test_learning_rate_scales_with_the_batch():
    assert scale_learning_rate(1e-4, 512) == pytest.approx(2e-4)
    assert scale_learning_rate(1e-4, 64, base_batch_size=128) == pytest.approx(5e-5)
    with pytest.raises(ValueError, match="batch sizes"):
        scale_learning_rate(1e-4, 0)


def test_cosine_schedule_by_hand():
    rates = [learning_rate_at(step, 2.0, "cosine", 4, 12) for step in (0, 1, 3, 4, 8, 12, 100)]
    assert rates == pytest.approx([0.5, 1.0, 2.0, 2.0, 1.0, 0.0, 0.0], abs=1e-12)
    halfway = learning_rate_at(8, 2.0, "cosine", 4, 12, final_learning_rate=1.0)
    assert halfway == pytest.approx(1.5) and learning_rate_at(12, 2.0, "cosine", 4, 12, 1.0) == pytest.approx(1.0)


def test_constant_schedule_by_hand():
    assert [learning_rate_at(step, 3.0, "constant", 3, 5) for step in (0, 1, 2, 3, 99)] == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert learning_rate_at(0, 3.0, "constant", 0, 1) == 3.0


def test_schedule_rises_then_falls_and_is_never_zero_inside_the_run():
    rates = [learning_rate_at(step, 1.0, "cosine", 10, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0 and max(rates) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, "linear", 0, 10), "`schedule`.*'linear'"),
        ((-1, 1.0, "cosine", 0, 10), "`step`"),
        ((0, 1.0, "constant", -1, 10), "`warmup_steps`"),
        ((0, 1.0, "cosine", 10, 10), "shorten the warm-up"),
        ((0, 1.0, "constant", 0, 10, 0.5), "`final_learning_rate`"),
    ],
)
def test_bad_schedules_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_at(*arguments)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
def test_learning_rate_is_set_in_every_group(rate):
    optimizer = torch.optim.AdamW(weight_decay_groups(nn.Linear(2, 2), 0.1), lr=rate)
    set_learning_rate(optimizer, 0.025)
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.025, 0.025])
    assert all(type(group["lr"]) is type(rate) for group in optimizer.param_groups)


def test_ema_decay_is_constant_from_the_second_update_on():
    model = tiny_transformer()
    names = [name for name, _ in model.named_parameters()]
    ema = create_ema(model, decay=0.9)
    expected = None
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1.0)
        ema.step(model.parameters())
        weights = [parameter.detach().double() for parameter in model.parameters()]
        # the first update copies: the average starts at the weights after one step
        expected = (
            weights
            if expected is None
            else [0.9 * average + 0.1 * weight for average, weight in zip(expected, weights, strict=True)]
        )
        for name, shadow, average in zip(names, ema.shadow_params, expected, strict=True):
            assert torch.allclose(shadow.double(), average, atol=1e-5), (step, name)


def test_ema_of_frozen_weights_is_bit_identical():
    model = tiny_tokenizer()
    model.encoder.requires_grad_(False)
    reference = [parameter.clone() for parameter in model.encoder.parameters()]
    ema = create_ema(model, decay=0.9)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(1.1)
        ema.step(model.parameters())
    averaged = tiny_tokenizer()
    ema.copy_to(averaged.parameters())
    for parameter, expected in zip(averaged.encoder.parameters(), reference, strict=True):
        assert torch.equal(parameter, expected)
    assert not torch.equal(averaged.decoder.proj_out.weight, model.decoder.proj_out.weight)


def test_ema_saves_and_loads_with_its_decay(tmp_path):
    model = tiny_transformer()
    ema = create_ema(model, decay=0.75)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    loaded = type(ema).from_pretrained(tmp_path, SiTTransformer1DModel)
    assert (loaded.decay, loaded.min_decay, loaded.optimization_step) == (0.75, 0.75, 1)
    assert all(map(torch.equal, loaded.shadow_params, ema.shadow_params))


def test_default_ema_decay_is_the_published_one():
    ema = create_ema(tiny_transformer())
    assert ema.get_decay(2) == ema.get_decay(10**6) == 0.9999


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_bad_ema_decay_raises(decay):
    with pytest.raises(ValueError, match="`decay`"):
        create_ema(tiny_transformer(), decay)


def test_matrices_with_spectral_norm_decay_like_others():
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv1d(3, 4, 5))
    decayed, undecayed = weight_decay_groups(layer, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3, 5)] and [p.shape for p in undecayed["params"]] == [(4,)]


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.0, 30.0, math.inf, math.nan])
def test_gradients_are_clipped_as_torch_does_and_small_ones_are_not_touched(scale):
    found = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_gradients):
        parameters = list(tiny_transformer().parameters())
        generator = torch.Generator().manual_seed(0)
        gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
        norm = torch.nn.utils.get_total_norm(gradients[1:])
        for parameter, gradient in zip(parameters[1:], gradients[1:], strict=True):
            parameter.grad = gradient * (scale / norm)
        before = [p.grad._version for p in parameters[1:]]
        found.append([clip(parameters, 1.0), *(p.grad for p in parameters[1:])])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert (before == [p.grad._version for p in parameters[1:]]) == (scale < 1)
