import copy
import math

import pytest
import torch
import torch.distributed as dist
from timm.models import VisionTransformer
from torch.nn.parallel import DistributedDataParallel

from maetok_hf.training.adversarial import output_gradient, weight_gradient_norm
from maetok_hf.training.diffaugment import diffaugment
from maetok_hf.training.discriminator import Discriminator
from maetok_hf.training.discriminator_objective import DiscriminatorObjective, sample_adversarial_draws


def objective_of(input_mode="resize", **kwargs):
    torch.manual_seed(0)
    trunk = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    return DiscriminatorObjective(Discriminator(trunk, input_mode), **kwargs)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def unchanged(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in snapshot(module).items())


@pytest.fixture
def real():
    """Smooth images, which an untrained trunk tells from noise."""
    corners = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(corners, 40, mode="bilinear")


@pytest.fixture
def fake():
    return torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def draws():
    return sample_adversarial_draws(0, "discriminator", 0, range(4))


def rows(draws, part):
    return {name: value[part] for name, value in draws.items()}


def test_draws_are_those_of_the_image_and_of_their_name():
    draws = sample_adversarial_draws(0, "discriminator", 3, [5, 6])
    shapes = {name: tuple(value.shape) for name, value in draws.items()}
    looks = dict.fromkeys(("real", "fake", "real_again", "fake_again"), (2, 10))
    assert shapes == looks | {"real_crop": (2, 2), "fake_crop": (2, 2)}
    alone = sample_adversarial_draws(0, "discriminator", 3, [6])
    assert all(torch.equal(draws[name][1:], alone[name]) for name in draws)
    generator = sample_adversarial_draws(0, "generator", 3, [5, 6])
    numbers = torch.cat([value.flatten() for value in (*draws.values(), *generator.values())])
    assert numbers.unique().numel() == numbers.numel()


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_terms_are_those_of_the_logits_and_sum_up_by_weight(real, fake, draws, loss):
    strength = (0.7, 0.4)
    settings = dict(zip(("diffaugment_probability", "diffaugment_cutout"), strength, strict=True))
    objective = objective_of(loss=loss, lecam_weight=0.5, consistency_weight=3.0, **settings).eval()
    objective.mean_logits.copy_(torch.tensor([0.4, -0.3]))
    objective.num_updates.fill_(1)
    terms = objective(real, fake, draws)
    assert list(terms) == ["loss", "discriminator", "lecam", "consistency", "logits_real", "logits_fake"]

    def logits(images, look):
        # the second look is the stronger one
        seen = diffaugment(images, draws[look], objective.policy, *((1.0, 0.5) if "again" in look else strength))
        return objective.discriminator(seen)

    r, f = logits(real, "real"), logits(fake, "fake")
    if loss == "hinge":
        expected = ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean()) / 2
    else:
        expected = ((1 + (-r).exp()).log().mean() + (1 + f.exp()).log().mean()) / 2
    lecam = (r + 0.3).clamp(min=0).square().mean() + (0.4 - f).clamp(min=0).square().mean()
    consistency = (
        (r - logits(real, "real_again")).square().mean() + (f - logits(fake, "fake_again")).square().mean()
    ) / 2
    assert torch.allclose(terms["discriminator"], expected, atol=1e-5)
    assert torch.allclose(terms["lecam"], lecam, atol=1e-5)
    assert torch.allclose(terms["consistency"], consistency, atol=1e-5) and consistency > 1e-4
    assert torch.allclose(terms["loss"], expected + 0.5 * lecam + 3 * consistency, atol=1e-5)
    assert torch.allclose(terms["logits_real"], r.mean(), atol=1e-5)
    assert torch.allclose(terms["logits_fake"], f.mean(), atol=1e-5)
    assert [name for name, term in terms.items() if term.requires_grad] == ["loss"]
    assert all(term.dtype == torch.float32 and term.ndim == 0 for term in terms.values())


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_steps_of_the_discriminator_raise_real_and_lower_fake_logits(real, fake, draws, loss):
    # consistency alone would draw all logits of fresh heads together
    objective = objective_of(loss=loss, consistency_weight=0.0)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    first = objective(real, fake, draws)
    for _ in range(10):
        optimizer.zero_grad()
        objective(real, fake, draws)["loss"].backward()
        optimizer.step()
    last = objective(real, fake, draws)
    assert last["loss"] < first["loss"]
    assert last["logits_real"] > first["logits_real"] and last["logits_fake"] < first["logits_fake"]


def test_descent_on_consistency_draws_the_looks_together(real, fake, draws):
    objective = objective_of()
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
    first = objective(real, fake, draws)
    first["loss"].backward()
    optimizer.step()
    assert objective(real, fake, draws)["consistency"] < first["consistency"]


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_steps_of_the_generator_raise_the_logits_of_its_images(fake, draws, loss):
    objective = objective_of(loss=loss)
    images = fake.clone().requires_grad_()
    before = objective.generator_loss(images, draws)
    before.backward()
    moved = images.detach() - 0.1 * images.grad / images.grad.norm()
    assert objective.generator_loss(moved, draws) < before

    def logits(images):
        return objective.discriminator.judge(diffaugment(images, draws["fake"], objective.policy, 0.5, 0.2)).mean()

    assert logits(moved) > logits(images)


def test_a_step_of_the_discriminator_leaves_the_reconstructions_graph_untouched(real, draws):
    objective = objective_of()
    scale = torch.ones(4, 3, 1, 1, requires_grad=True)
    reconstruction = real * scale
    objective(real.clone().requires_grad_(), reconstruction, draws)["loss"].backward()
    assert scale.grad is None
    assert all(parameter.grad is not None for parameter in objective.parameters())
    # the graph is still there for the tokenizer's own step
    objective.generator_loss(reconstruction, draws).backward()
    assert scale.grad.abs().max() > 0


def test_a_step_of_the_generator_leaves_the_discriminator_untouched(fake, draws):
    objective = objective_of().train()
    before = snapshot(objective)
    objective.generator_loss(fake.clone().requires_grad_(), draws).backward()
    assert unchanged(objective, before)
    assert all(parameter.grad is None for parameter in objective.parameters())
    # nor does it count as a step's logits
    objective.end_step()
    assert unchanged(objective, before)


def test_the_first_look_is_the_image_itself_where_nothing_happens_to_it(real, fake, draws):
    seen = []
    objective = objective_of(diffaugment_probability=0.0)
    objective.discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    objective(real, fake, draws)
    objective.generator_loss(fake, draws)
    assert torch.equal(seen[0][:8], torch.cat([real, fake])) and torch.equal(seen[1], fake)
    assert not torch.isclose(seen[0][8:], torch.cat([real, fake])).flatten(1).all(1).any()


def test_without_consistency_there_is_no_second_look(real, fake, draws):
    sizes = []
    for weight in (4.0, 0.0):
        objective = objective_of(consistency_weight=weight)
        objective.discriminator.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        terms = objective(real, fake, draws)
    assert sizes == [16, 8]
    assert terms["consistency"] == 0 and torch.equal(terms["loss"], terms["discriminator"])


def test_one_pass_makes_one_power_iteration(real, fake, draws):
    objective = objective_of()
    reference = copy.deepcopy(objective.discriminator)
    objective(real, fake, draws)
    reference(real)
    assert unchanged(objective.discriminator, snapshot(reference))


def test_images_are_seen_through_the_draws(real, fake, draws):
    objective = objective_of().eval()
    other = sample_adversarial_draws(0, "discriminator", 1, range(4))
    assert torch.equal(objective(real, fake, draws)["loss"], objective(real, fake, draws)["loss"])
    assert not torch.equal(objective(real, fake, draws)["loss"], objective(real, fake, other)["loss"])


def test_both_looks_at_an_image_are_at_the_same_window(real, fake, draws):
    objective = objective_of("crop")
    windows = []
    objective.discriminator.register_forward_pre_hook(lambda module, args: windows.append(args[1]))
    objective(real, fake, draws)
    expected = torch.cat([draws["real_crop"], draws["fake_crop"]])
    assert torch.equal(windows[0], torch.cat([expected, expected]))
    # and that of the generator is that of the reconstructions
    objective.generator_loss(fake, draws)
    assert torch.equal(windows[1], draws["fake_crop"])


def test_lecam_is_zero_until_its_averages_are_known(real, fake, draws):
    objective = objective_of(lecam_weight=10.0, consistency_weight=0.0)
    terms = objective(real, fake, draws)
    assert terms["lecam"] == 0 and torch.equal(terms["loss"], terms["discriminator"])
    objective.end_step()
    assert objective(real, fake, draws)["lecam"] > 0


def test_averages_start_at_the_first_step_and_then_decay(real, fake, draws):
    objective = objective_of(lecam_decay=0.75)
    first = objective(real, fake, draws)
    objective.end_step()
    start = torch.stack([first["logits_real"], first["logits_fake"]])
    assert torch.allclose(objective.mean_logits, start)
    second = objective(fake, real, draws)
    objective.end_step()
    new = torch.stack([second["logits_real"], second["logits_fake"]])
    assert torch.allclose(objective.mean_logits, 0.75 * start + 0.25 * new)
    assert objective.num_updates == 2
    # a step without micro-batches is none
    objective.end_step()
    assert objective.num_updates == 2


def test_averages_do_not_depend_on_how_a_step_is_cut(real, fake, draws):
    whole, pieces, first, second = (objective_of() for _ in range(4))
    # frozen vectors: the power iteration runs for each forward pass
    for objective in (whole, pieces, first, second):
        objective.discriminator.eval()
    head, tail = slice(0, 1), slice(1, 4)
    whole(real, fake, draws)
    whole.end_step()
    for part in (head, tail):
        pieces(real[part], fake[part], rows(draws, part))
    pieces.end_step()
    assert torch.allclose(pieces.mean_logits, whole.mean_logits, atol=1e-6)

    # two processes with unequal shares
    first(real[head], fake[head], rows(draws, head))
    second(real[tail], fake[tail], rows(draws, tail))
    total = (first._step_sums + second._step_sums) / 2
    for objective in (first, second):
        objective.end_step(lambda sums: total)
        assert torch.allclose(objective.mean_logits, whole.mean_logits, atol=1e-6)


def test_averages_are_saved_with_the_heads_and_without_the_trunk(real, fake, draws):
    objective, fresh = objective_of(), objective_of()
    objective(real, fake, draws)
    objective.end_step()
    state = objective.state_dict()
    assert {name for name in state if not name.startswith("discriminator.heads.")} == {"mean_logits", "num_updates"}
    fresh.load_state_dict(state)
    assert torch.equal(fresh.mean_logits, objective.mean_logits) and fresh.num_updates == 1


@pytest.mark.parametrize("initialized", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_do_not_enter_the_averages(real, fake, draws, initialized, bad):
    objective = objective_of()
    if initialized:
        objective(real, fake, draws)
        objective.end_step()
    before = objective.mean_logits.clone(), objective.num_updates.clone()
    objective(real, fake, draws)
    broken = real.clone()
    broken[0] = bad
    assert not objective(broken, fake, draws)["loss"].isfinite()
    objective.end_step()
    assert torch.equal(objective.mean_logits, before[0]) and objective.num_updates == before[1]
    # the next step counts again
    assert objective(real, fake, draws)["loss"].isfinite()
    objective.end_step()
    assert objective.num_updates == before[1] + 1 and objective.mean_logits.isfinite().all()


def test_evaluation_does_not_count(real, fake, draws):
    objective = objective_of().eval()
    before = snapshot(objective)
    objective(real, fake, draws)
    objective.end_step()
    assert unchanged(objective, before)


def test_accumulated_gradients_are_those_of_the_whole_batch(real, fake, draws):
    whole, pieces = objective_of(), objective_of()
    for objective in (whole, pieces):
        objective.discriminator.eval()
    whole(real, fake, draws)["loss"].backward()
    for part in (slice(0, 2), slice(2, 4)):
        (pieces(real[part], fake[part], rows(draws, part))["loss"] / 2).backward()
    for expected, parameter in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_finite_float32_losses(real, fake, draws, dtype):
    objective = objective_of()
    images = fake.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        terms = objective(real, images, draws)
        adversarial = objective.generator_loss(images, draws)
    terms["loss"].backward()
    adversarial.backward()
    for value in (*terms.values(), adversarial):
        assert value.dtype == torch.float32 and value.isfinite()
    assert images.grad.isfinite().all()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in objective.parameters())


def test_the_adversarial_gradient_reaches_a_last_pixel_layer(real, draws):
    objective = objective_of(consistency_weight=0.0)
    torch.manual_seed(1)
    layer, hidden = torch.nn.Linear(6, 3 * 64), torch.randn(4, 25, 6)
    output = layer(hidden)
    images = torch.nn.functional.fold(output.mT, 40, 8, stride=8)
    loss = objective.generator_loss(images, draws)
    norm = weight_gradient_norm(hidden, output_gradient(objective.generator_loss(images, draws), output))
    loss.backward()
    assert norm > 0 and torch.allclose(norm, layer.weight.grad.norm())


def test_ddp_wraps_the_heads_and_the_generator_step_stays_outside(real, fake, draws, tmp_path):
    plain, inner = objective_of(), objective_of()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(inner)
        images = fake.clone().requires_grad_()
        inner.generator_loss(images, draws).backward()
        assert images.grad.abs().max() > 0 and all(p.grad is None for p in inner.parameters())
        for _ in range(2):
            wrapped(real, fake, draws)["loss"].backward()
            inner.generator_loss(images, draws).backward()
            inner.end_step()
    finally:
        dist.destroy_process_group()
    for _ in range(2):
        plain(real, fake, draws)["loss"].backward()
        plain.end_step()
    assert unchanged(inner, snapshot(plain))
    for expected, parameter in zip(plain.parameters(), inner.parameters(), strict=True):
        assert torch.allclose(parameter.grad, expected.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "bce"}, "`loss` must be one of 'hinge', 'non_saturating', got 'bce'"),
        ({"lecam_weight": -1.0}, "`lecam_weight` must be finite and not negative, got -1.0"),
        ({"consistency_weight": math.nan}, "`consistency_weight` must be finite and not negative, got nan"),
        ({"lecam_decay": 1.0}, r"`lecam_decay` must be in \[0, 1\), got 1.0"),
        ({"diffaugment": ["blur"]}, "names 'blur': choose from"),
        ({"diffaugment_probability": 1.5}, r"`diffaugment_probability` must be in \[0, 1\], got 1.5"),
        ({"diffaugment_cutout": -0.1}, r"`diffaugment_cutout` must be in \[0, 1\], got -0.1"),
        (
            {"diffaugment": []},
            "`consistency_weight` compares two augmentations of an image but `diffaugment` is empty",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        objective_of(**settings)


def test_unequal_batches_are_refused(real, fake, draws):
    with pytest.raises(ValueError, match="`fake` must be reconstructions of `real`"):
        objective_of()(real, fake[:2], draws)
