import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maetok_hf.conversion import convert_transformer
from maetok_hf.models.transformer_sit import SiTTransformer1DModel
from maetok_hf.training.flow_matching import (
    FlowMatchingObjective,
    direction_loss,
    flow_matching_loss,
    interpolate,
    sample_flow_draws,
    shift_time,
    time_from_draw,
    velocity_target,
)


GOLDEN = Path(__file__).parents[1] / "golden" / "sit"
PATHS = ("linear", "cosine")


def tiny_transformer(path="linear", **kwargs):
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "in_channels": 3, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    transformer = SiTTransformer1DModel(num_classes=5, path=path, **sizes, **kwargs)
    with torch.no_grad():
        for parameter in transformer.parameters():  # adaLN-Zero would make every output 0
            parameter.normal_(std=0.2)
    return transformer


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 5, 3, generator=generator), torch.randn(4, 5, 3, generator=generator)


@pytest.mark.parametrize("path", PATHS)
def test_path_goes_from_data_to_noise(path, pair):
    data, noise = pair
    assert torch.equal(interpolate(data, noise, torch.zeros(4), path), data)
    assert torch.allclose(interpolate(data, noise, torch.ones(4), path), noise, atol=1e-6)


def test_velocity_at_t0_and_t1(pair):
    data, noise = pair
    for t in (torch.zeros(4), torch.full((4,), 0.3), torch.ones(4)):
        assert torch.equal(velocity_target(data, noise, t, "linear"), noise - data)
    assert torch.allclose(velocity_target(data, noise, torch.zeros(4), "cosine"), math.pi / 2 * noise)
    assert torch.allclose(velocity_target(data, noise, torch.ones(4), "cosine"), -math.pi / 2 * data, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_path(path, pair):
    data, noise = (tensor.double() for tensor in pair)
    t, h = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64), 1e-5
    difference = interpolate(data, noise, t + h, path) - interpolate(data, noise, t - h, path)
    assert torch.allclose(velocity_target(data, noise, t, path), difference / (2 * h), atol=1e-8)


def test_times_belong_to_images_in_either_shape(pair):
    data, noise = pair
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    for path in PATHS:
        flat = interpolate(data, noise, t, path)
        assert torch.equal(flat, interpolate(data, noise, t.reshape(4, 1, 1), path))
        assert torch.equal(flat[1], interpolate(data[1:2], noise[1:2], t[1:2], path)[0])


@pytest.mark.parametrize("shape", [(), (3,), (1,), (4, 5), (2, 2)])
def test_one_time_per_image(pair, shape):
    for function in (interpolate, velocity_target):
        with pytest.raises(ValueError, match="one time per image"):
            function(*pair, torch.zeros(shape), "linear")


def test_lognormal_draws_give_the_time_of_their_noise_to_data_ratio():
    n = torch.linspace(-3, 3, 13, dtype=torch.float64)
    linear, cosine = (time_from_draw(n, "lognormal", path) for path in PATHS)
    assert torch.allclose(linear / (1 - linear), torch.exp(n))
    assert torch.allclose(torch.tan(cosine * math.pi / 2), torch.exp(n))
    assert torch.allclose(time_from_draw(torch.zeros(1), "lognormal", "cosine"), torch.tensor([0.5]))


def test_lognormal_times_stay_in_the_unit_interval():
    extreme = torch.tensor([-200.0, 200.0])
    for path in PATHS:
        assert torch.equal(time_from_draw(extreme, "lognormal", path).clamp(0, 1), torch.tensor([0.0, 1.0]))


def test_uniform_draws_are_the_times():
    draw = torch.rand(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(time_from_draw(draw, "uniform", "linear"), draw)


def test_time_shift_by_hand():
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(shift_time(t, 1.0), t)
    assert torch.allclose(shift_time(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    assert torch.allclose(shift_time(shift_time(t, 3.0), 1 / 3), t)
    assert torch.allclose(time_from_draw(t, "uniform", "linear", shift=3.0), torch.tensor([0.0, 0.75, 1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian", "linear"), "`density`.*'gaussian'"),
        (("uniform", "quadratic"), "`path`.*'quadratic'"),
        (("uniform", "linear", 0.0), "`shift`"),
        (("uniform", "linear", math.inf), "`shift`"),
    ],
)
def test_bad_time_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        time_from_draw(torch.zeros(1), *arguments)


def test_loss_by_hand():
    output = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0]], [[3.0, 1.0]]])
    assert torch.equal(flow_matching_loss(output, target), torch.tensor([2.5, 5.0]))
    with pytest.raises(ValueError, match=r"\(2, 1, 2\).*\(1, 1, 2\)"):
        flow_matching_loss(output, target[:1])


def test_loss_pushes_the_output_towards_the_target():
    output = torch.zeros(1, 1, 2, requires_grad=True)
    flow_matching_loss(output, torch.tensor([[[1.0, -2.0]]])).sum().backward()
    assert output.grad[0, 0, 0] < 0 < output.grad[0, 0, 1]


def test_direction_is_of_the_channels_of_each_token():
    # two tokens: one at a right angle, one opposite, of lengths that do not count
    output = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [0.0, 5.0]]])
    target = torch.tensor([[[0.0, 1.0], [0.0, -7.0]], [[4.0, 4.0], [0.0, 1.0]]])
    assert torch.allclose(direction_loss(output, target), torch.tensor([1.5, 0.0]))
    assert torch.allclose(direction_loss(-target, target), torch.tensor([2.0, 2.0]))
    with pytest.raises(ValueError, match=r"\(2, 2, 2\).*\(1, 2, 2\)"):
        direction_loss(output, target[:1])


def test_direction_turns_the_output_towards_the_target_and_leaves_its_length():
    output = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    direction_loss(output, torch.tensor([[[1.0, 1.0]]])).sum().backward()
    assert output.grad[0, 0, 1] < 0 and output.grad[0, 0, 0] == pytest.approx(0, abs=1e-6)


def test_direction_of_a_model_that_begins_as_zero_has_a_finite_pull():
    output = torch.zeros(1, 1, 2, requires_grad=True)
    loss = direction_loss(output, torch.tensor([[[3.0, -4.0]]]))
    loss.sum().backward()
    assert loss.item() == 1.0
    assert torch.allclose(output.grad / output.grad.norm(), torch.tensor([-0.6, 0.8]))
    assert output.grad.norm() < 200


def test_terms_are_returned_by_name_and_weighted_in_the_loss(pair):
    data, noise = (tensor[:, :4] for tensor in pair)
    inputs = (data, torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.4, 0.6, 0.9]), noise)
    transformer = tiny_transformer()
    plain = FlowMatchingObjective(transformer)(*inputs)
    both = FlowMatchingObjective(transformer, direction_weight=0.5)(*inputs)
    assert plain.keys() == {"loss", "loss_per_image", "velocity"}
    assert torch.equal(plain["velocity"], plain["loss"].detach())
    assert torch.equal(both["velocity"], plain["velocity"]) and 0 < both["direction"] < 2
    assert torch.allclose(both["loss"], both["velocity"] + 0.5 * both["direction"])
    assert both["loss"].requires_grad and not both["direction"].requires_grad


def test_loss_of_low_precision_outputs_is_float32():
    output = torch.full((1, 2, 2), 300.0, dtype=torch.float16)
    loss = flow_matching_loss(output, torch.zeros(1, 2, 2))
    assert loss.dtype == torch.float32 and loss.item() == 90000  # beyond float16
    direction = direction_loss(output, -torch.ones(1, 2, 2))
    assert direction.dtype == torch.float32 and direction.item() == pytest.approx(2)


def test_draws_of_an_image_do_not_depend_on_its_batch():
    for density in ("uniform", "lognormal"):
        draws = sample_flow_draws(1, 2, [5, 6, 7], (4, 3), density, guidance_free=True)
        other = sample_flow_draws(1, 2, torch.tensor([7, 100]), (4, 3), density, guidance_free=True)
        for field, other_field in zip(draws, other, strict=True):
            assert torch.equal(field[2], other_field[0])
        assert not torch.equal(draws.noise, sample_flow_draws(1, 3, [5, 6, 7], (4, 3), density).noise)


def test_draws_follow_their_laws():
    indices = range(4000)
    draws = sample_flow_draws(0, 0, indices, (1,), "uniform", class_dropout_prob=0.25, guidance_free=True)
    assert draws.draw.shape == (4000,) and 0 <= draws.draw.min() and draws.draw.max() < 1
    assert abs(draws.draw.mean() - 0.5) < 0.02 and abs(draws.draw.var() - 1 / 12) < 0.005
    assert abs(draws.class_drop_mask.float().mean() - 0.25) < 0.03
    assert draws.class_drop_mask.dtype == torch.bool
    beta = draws.guidance_temperature
    assert 0 < beta.min() and beta.max() <= 1
    assert abs(beta.mean() - 0.5) < 0.02 and abs(beta.var() - 1 / 12) < 0.005
    # time, noise, class drop and temperature are independent
    columns = torch.stack([draws.draw, draws.noise[:, 0], draws.class_drop_mask.float(), beta])
    assert (torch.corrcoef(columns) - torch.eye(4)).abs().max() < 0.06
    normal = sample_flow_draws(0, 0, indices, (1,), "lognormal")
    assert abs(normal.draw.mean()) < 0.06 and abs(normal.draw.std() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([normal.draw, normal.noise[:, 0]]))[0, 1]) < 0.06


def test_temperatures_are_drawn_on_request_and_change_no_other_draw():
    without = sample_flow_draws(0, 3, range(5), (4, 3))
    with_temperature = sample_flow_draws(0, 3, range(5), (4, 3), guidance_free=True)
    assert without.guidance_temperature is None and with_temperature.guidance_temperature.shape == (5,)
    for field, other_field in zip(without[:3], with_temperature[:3], strict=True):
        assert torch.equal(field, other_field)


def test_class_dropout_probabilities_0_and_1_are_exact():
    assert not sample_flow_draws(0, 0, range(50), (1,), class_dropout_prob=0.0).class_drop_mask.any()
    assert sample_flow_draws(0, 0, range(50), (1,), class_dropout_prob=1.0).class_drop_mask.all()


def test_bad_draw_arguments_raise():
    with pytest.raises(ValueError, match="`density`"):
        sample_flow_draws(0, 0, [0], (1,), "normal")
    with pytest.raises(ValueError, match="`class_dropout_prob`"):
        sample_flow_draws(0, 0, [0], (1,), class_dropout_prob=1.1)
    with pytest.raises(ValueError, match="`sample_indices`"):
        sample_flow_draws(0, 0, [], (1,))


@pytest.mark.parametrize("density", ["uniform", "lognormal"])
@pytest.mark.parametrize("path", PATHS)
def test_losses_match_golden(path, density):
    reference = load_file(GOLDEN / "io.safetensors")
    transformer = convert_transformer(GOLDEN).eval()
    transformer.register_to_config(path=path)
    objective = FlowMatchingObjective(transformer, density)
    name = f"loss_{path}_{density}"
    with torch.no_grad():
        output = objective(
            reference["sample"], reference["class_labels"], reference[f"{name}_draw"], reference[f"{name}_noise"]
        )
    assert (output["loss_per_image"] - reference[name]).abs().max() < 1e-5
    assert output["loss"].item() == pytest.approx(reference[name].mean().item(), abs=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_objective_is_the_loss_of_the_model_at_the_interpolated_point(path, pair):
    data, noise = (tensor[:, :4] for tensor in pair)
    transformer = tiny_transformer(path)
    labels, draw = torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.4, 0.6, 0.9])
    output = FlowMatchingObjective(transformer, "uniform", time_shift=2.0)(data, labels, draw, noise)
    t = 2 * draw / (1 + draw)
    prediction = transformer.eval()(interpolate(data, noise, t, path), t, labels).sample
    expected = (prediction - velocity_target(data, noise, t, path)).square().mean(dim=(1, 2))
    assert torch.allclose(output["loss_per_image"], expected, atol=1e-6)
    assert torch.allclose(output["loss"], expected.mean()) and output["loss"].requires_grad
    assert not output["loss_per_image"].requires_grad


def test_labels_are_dropped_by_the_mask_only(pair):
    data, noise = (tensor[:, :4] for tensor in pair)
    transformer = tiny_transformer(class_dropout_prob=1.0)
    objective = FlowMatchingObjective(transformer).train()
    labels, draw = torch.tensor([0, 1, 2, 3]), torch.full((4,), 0.5)
    kept = objective(data, labels, draw, noise)["loss_per_image"]
    mask = torch.tensor([False, True, False, True])
    dropped = objective(data, labels, draw, noise, mask)["loss_per_image"]
    null = objective(data, torch.full((4,), 5), draw, noise)["loss_per_image"]
    assert torch.equal(dropped[~mask], kept[~mask]) and torch.allclose(dropped[mask], null[mask])
    assert not torch.isclose(kept, null, atol=1e-4).any()


def test_objective_draws_nothing(pair):
    data, noise = (tensor[:, :4] for tensor in pair)
    objective = FlowMatchingObjective(tiny_transformer()).train()
    state = torch.random.get_rng_state()
    objective(data, torch.zeros(4, dtype=torch.long), torch.full((4,), 0.5), noise)
    assert torch.equal(state, torch.random.get_rng_state())


def test_objective_refuses_bad_input(pair):
    data, noise = (tensor[:, :4] for tensor in pair)
    labels = torch.zeros(4, dtype=torch.long)
    objective = FlowMatchingObjective(tiny_transformer())
    with pytest.raises(ValueError, match="`noise`"):
        objective(data, labels, torch.zeros(4), noise[:, :2])
    with pytest.raises(ValueError, match="one time per image"):
        objective(data, labels, torch.zeros(4, 4), noise)
    with pytest.raises(ValueError, match="`density`"):
        FlowMatchingObjective(tiny_transformer(), density="logit")
    with pytest.raises(ValueError, match="`shift`"):
        FlowMatchingObjective(tiny_transformer(), time_shift=-1.0)
    for name in ("direction_weight", "alignment_weight"):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"`{name}` must be finite and not negative, got {value}"):
                FlowMatchingObjective(tiny_transformer(), **{name: value})
