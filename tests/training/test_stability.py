"""`StepGuard`: a step that is not finite leaves no trace but a count."""

import copy

import pytest
import torch

from maetok_hf.training.stability import StepGuard


CPU = torch.device("cpu")


@pytest.fixture
def trained():
    """A linear layer and its fused AdamW after one ordinary step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return layer, optimizer


def step(layer, optimizer, guard, scale):
    guard.expose(layer(torch.ones(1, 3)).sum() * scale).backward()
    admitted = guard.admit([torch.nn.utils.get_total_norm([p.grad for p in layer.parameters()])])
    optimizer.step()
    optimizer.zero_grad()
    return bool(admitted)


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -torch.inf])
def test_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(trained, scale):
    layer, optimizer = trained
    guard = StepGuard([optimizer], 5, CPU)
    weights, state = copy.deepcopy(layer.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    assert not step(layer, optimizer, guard, scale)
    assert guard.num_skipped == 1
    for name, value in layer.state_dict().items():
        assert torch.equal(value, weights[name])
    for number, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, state[number][name]), name


def test_steps_around_a_skipped_one_are_those_of_a_run_without_it(trained):
    layer, optimizer = trained
    other = copy.deepcopy(layer)
    plain = torch.optim.AdamW(other.parameters(), lr=0.1, fused=True)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    guard, untroubled = StepGuard([optimizer], 5, CPU), StepGuard([plain], 5, CPU)
    assert [step(layer, optimizer, guard, scale) for scale in (1.0, torch.nan, 2.0)] == [True, False, True]
    assert [step(other, plain, untroubled, scale) for scale in (1.0, 2.0)] == [True, True]
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_a_finite_loss_keeps_its_value_and_gradient_and_another_poisons_them():
    x = torch.tensor(3.0, requires_grad=True)
    exposed = StepGuard.expose(2 * x)
    exposed.backward()
    assert (exposed.item(), x.grad.item()) == (6.0, 2.0)
    # an infinite loss whose gradient is finite would slip through
    x.grad = None
    StepGuard.expose(2 * x + torch.inf).backward()
    assert x.grad.isnan()


def test_one_broken_norm_stops_every_optimizer(trained):
    _, optimizer = trained
    guard = StepGuard([optimizer, copy.deepcopy(optimizer)], 5, CPU)
    assert guard.admit([torch.tensor(1.0), torch.tensor(2.0)])
    assert [float(o.found_inf) for o in guard.optimizers] == [0.0, 0.0]
    assert not guard.admit([torch.tensor(1.0), torch.tensor(torch.nan)])
    assert [float(o.found_inf) for o in guard.optimizers] == [1.0, 1.0]


def test_only_skipped_steps_in_a_row_exhaust_it(trained):
    _, optimizer = trained
    guard = StepGuard([optimizer], 3, CPU)
    bad, good = [torch.tensor(torch.inf)], [torch.tensor(1.0)]
    answers = []
    for norms in (bad, bad, good, bad, bad, bad, bad, bad, bad):
        guard.admit(norms)
        answers.append(guard.exhausted())
    # read at every third call, when 0, 3 and 6 in a row have been skipped
    assert answers == [False, False, False, False, False, True, False, False, True]
    assert guard.num_skipped == 8


def test_the_count_goes_on_after_a_restart(trained):
    guard = StepGuard([trained[1]], 2, CPU)
    guard.load(7)
    guard.admit([torch.tensor(torch.nan)])
    assert guard.num_skipped == 8 and not guard.exhausted()


def test_what_cannot_be_guarded_is_refused(trained):
    with pytest.raises(ValueError, match="`max_consecutive` must be at least 1, got 0"):
        StepGuard([], 0, CPU)
    with pytest.raises(ValueError, match="`optimizers` must be fused, got AdamW"):
        StepGuard([torch.optim.AdamW(trained[0].parameters())], 1, CPU)
