import math

import pytest
import torch
from torch import nn

from maetok_hf.training.adversarial import (
    ADVERSARIAL_LOSSES,
    adaptive_weight,
    consistency_loss,
    discriminator_loss,
    generator_loss,
    lecam_regularization,
    output_gradient,
    weight_gradient_norm,
    with_gradient,
)


REAL = torch.tensor([[2.0, 0.5], [-1.0, 0.0]])
FAKE = torch.tensor([[-2.0, 0.5], [1.0, -0.25]])


def softplus(x):
    return math.log(1 + math.exp(x))


def test_hinge_matches_hand_computation():
    # relu(1 - r): 0, 0.5, 2, 1; relu(1 + f): 0, 1.5, 2, 0.75
    assert discriminator_loss(REAL, FAKE, "hinge").item() == (3.5 / 4 + 4.25 / 4) / 2
    assert generator_loss(FAKE, "hinge").item() == 0.75 / 4


def test_non_saturating_matches_hand_computation():
    real = (softplus(-2) + softplus(-0.5) + softplus(1) + softplus(0)) / 4
    fake = (softplus(-2) + softplus(0.5) + softplus(1) + softplus(-0.25)) / 4
    assert discriminator_loss(REAL, FAKE, "non_saturating").item() == pytest.approx((real + fake) / 2)
    fooled = (softplus(2) + softplus(-0.5) + softplus(-1) + softplus(0.25)) / 4
    assert generator_loss(FAKE, "non_saturating").item() == pytest.approx(fooled)


@pytest.mark.parametrize("loss_type", ADVERSARIAL_LOSSES)
def test_descent_raises_real_and_lowers_fake_logits_of_the_discriminator(loss_type):
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    discriminator_loss(real, fake, loss_type).backward()
    active_real = real < 1 if loss_type == "hinge" else torch.ones_like(real, dtype=torch.bool)
    active_fake = fake > -1 if loss_type == "hinge" else torch.ones_like(fake, dtype=torch.bool)
    assert (real.grad[active_real] < 0).all() and (real.grad[~active_real] == 0).all()
    assert (fake.grad[active_fake] > 0).all() and (fake.grad[~active_fake] == 0).all()


@pytest.mark.parametrize("loss_type", ADVERSARIAL_LOSSES)
def test_descent_raises_fake_logits_of_the_generator(loss_type):
    fake = FAKE.clone().requires_grad_()
    generator_loss(fake, loss_type).backward()
    assert (fake.grad < 0).all()


def test_unknown_loss_is_refused():
    for call in (lambda: discriminator_loss(REAL, FAKE, "bce"), lambda: generator_loss(FAKE, "bce")):
        with pytest.raises(ValueError, match="`loss_type` must be one of 'hinge', 'non_saturating', got 'bce'"):
            call()


def test_lecam_matches_hand_computation():
    # relu(r - 0.25): 1.75, 0.25, 0, 0; relu(0.5 - f): 2.5, 0, 0, 0.75
    value = lecam_regularization(REAL, FAKE, torch.tensor(0.5), torch.tensor(0.25))
    assert value.item() == (1.75**2 + 0.25**2) / 4 + (2.5**2 + 0.75**2) / 4


def test_lecam_pulls_the_sides_together():
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    lecam_regularization(real, fake, torch.tensor(0.5), torch.tensor(0.25)).backward()
    assert (real.grad >= 0).all() and real.grad[0, 0] > 0
    assert (fake.grad <= 0).all() and fake.grad[0, 0] < 0


def test_consistency_matches_hand_computation():
    # differences 4, 0, -2, 0.25
    assert consistency_loss(REAL, FAKE).item() == (16 + 4 + 0.0625) / 4


@pytest.mark.parametrize("loss_type", ADVERSARIAL_LOSSES)
def test_losses_of_low_precision_logits_are_float32(loss_type):
    real, fake = REAL.bfloat16(), FAKE.bfloat16()
    mean = torch.zeros(())
    for loss in (
        discriminator_loss(real, fake, loss_type),
        generator_loss(fake, loss_type),
        lecam_regularization(real, fake, mean, mean),
        consistency_loss(real, fake),
    ):
        assert loss.dtype == torch.float32 and loss.isfinite()


def last_layer_gradient_norm(loss, layer_input, layer_output, loss_scale=1.0):
    return weight_gradient_norm(layer_input, output_gradient(loss, layer_output, loss_scale))


def linear_network(bias=True):
    """A network whose last layer is linear on (B, N, D), and what goes in and out of it."""
    torch.manual_seed(0)
    body, layer = nn.Linear(5, 6), nn.Linear(6, 4, bias=bias)
    hidden = torch.tanh(body(torch.randn(2, 7, 5)))
    return layer, hidden, layer(hidden)


@pytest.mark.parametrize("bias", [True, False])
def test_last_layer_gradient_norm_is_that_of_the_weight(bias):
    layer, hidden, output = linear_network(bias)
    loss = output.pow(3).mean() + output.abs().sum()
    (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    norm = last_layer_gradient_norm(loss, hidden, output)
    assert torch.allclose(norm, gradient.norm())
    assert norm.dtype == torch.float32 and not norm.requires_grad


def test_last_layer_gradient_norm_leaves_the_gradients_and_what_is_before_the_output_alone():
    layer, hidden, output = linear_network()
    last_layer_gradient_norm(output.square().mean(), hidden, output)
    assert layer.weight.grad is None
    output.sum().backward()
    assert layer.weight.grad is not None


def test_last_layer_gradient_norm_is_float32_under_autocast():
    layer, hidden, _ = linear_network()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
        loss = output.float().square().mean()
        norm = last_layer_gradient_norm(loss, hidden.bfloat16(), output)
    assert output.dtype == torch.bfloat16 and norm.dtype == torch.float32
    (gradient,) = torch.autograd.grad(layer(hidden).square().mean(), layer.weight)
    assert torch.allclose(norm, gradient.norm(), rtol=0.02)


def test_loss_scale_saves_gradients_that_float16_loses():
    layer, hidden, _ = linear_network()
    output = layer(hidden).detach().half().requires_grad_()
    assert last_layer_gradient_norm((output.float() * 1e-9).sum(), hidden, output) == 0
    loss = (output.float() * 1e-9).sum()
    expected = torch.linalg.matrix_norm(torch.full((4, 14), 1e-9) @ hidden.flatten(0, 1))
    assert torch.allclose(last_layer_gradient_norm(loss, hidden, output, 2.0**16), expected, rtol=1e-2)


def test_adaptive_weight_is_the_ratio_of_the_norms_clamped_and_detached():
    reconstruction = torch.tensor(3.0, requires_grad=True)
    weight = adaptive_weight(reconstruction, torch.tensor(1.5))
    assert weight.item() == pytest.approx(3 / 1.5001) and not weight.requires_grad
    assert adaptive_weight(torch.tensor(3.0), torch.tensor(0.0)).item() == 1e4
    assert adaptive_weight(torch.tensor(0.0), torch.tensor(2.0)).item() == 0
    assert adaptive_weight(torch.tensor(0.0), torch.tensor(0.0)).item() == 0


@pytest.mark.parametrize(
    ("reconstruction", "adversarial"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)]
)
def test_a_norm_that_is_not_finite_makes_the_weight_nan(reconstruction, adversarial):
    assert adaptive_weight(torch.tensor(reconstruction), torch.tensor(adversarial)).isnan()


def test_value_with_a_known_gradient_trains_like_the_value_itself():
    layer, hidden, output = linear_network()
    loss = output.pow(3).mean() + output.abs().sum()
    expected = torch.autograd.grad(2 * loss, [layer.weight, layer.bias], retain_graph=True)
    known = with_gradient(loss, output, output_gradient(loss, output))
    assert torch.equal(known, loss)
    for one, other in zip(torch.autograd.grad(2 * known, [layer.weight, layer.bias]), expected, strict=True):
        assert torch.allclose(one, other)
