import pytest
import torch

from maetok_hf.training.diffaugment import check_policy, diffaugment, sample_diffaugment_draws, take_windows


EVERYTHING = ["color", "translation", "cutout"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draws_of(**columns):
    """One row of draws in the middle of every range, but for the named columns."""
    names = ("brightness", "saturation", "contrast", "down", "right", "row", "column", *EVERYTHING)
    return torch.tensor([[columns.get(name, 0.5) for name in names]])


def test_draws_are_those_of_the_image_whatever_its_batch():
    draws = sample_diffaugment_draws(3, "fake", 7, [4, 5, 6])
    assert draws.shape == (3, 10) and draws.dtype == torch.float32
    assert (draws >= 0).all() and (draws < 1).all()
    assert torch.equal(draws[1:2], sample_diffaugment_draws(3, "fake", 7, torch.tensor([5])))
    for other in (
        sample_diffaugment_draws(4, "fake", 7, [5]),
        sample_diffaugment_draws(3, "real", 7, [5]),
        sample_diffaugment_draws(3, "fake", 8, [5]),
    ):
        assert not torch.equal(draws[1:2], other)


def test_no_augmentation_is_the_identity(images):
    draws = sample_diffaugment_draws(0, "fake", 0, range(3))
    assert torch.equal(diffaugment(images, draws, []), images)


def test_draws_in_the_middle_leave_color_and_position_alone(images):
    augmented = diffaugment(images[:1], draws_of(), ["color", "translation"])
    assert torch.allclose(augmented, images[:1], atol=1e-6)


def test_color_matches_hand_computation():
    # one pixel of (0.1, 0.3, 0.5) and one of (-0.3, -0.1, 0.1)
    images = torch.tensor([[0.1, -0.3], [0.3, -0.1], [0.5, 0.1]])[None, :, None]
    brighter = diffaugment(images, draws_of(brightness=0.75), ["color"])
    assert torch.allclose(brighter, images + 0.25)
    gray = diffaugment(images, draws_of(saturation=0.0), ["color"])
    assert torch.allclose(gray, torch.tensor([0.3, -0.1]).expand(1, 3, 1, 2))
    # the mean of the image is 0.1
    contrast = diffaugment(images, draws_of(contrast=0.0), ["color"])
    assert torch.allclose(contrast, 0.1 + 0.5 * (images - 0.1))


@pytest.mark.parametrize(("draw", "shift"), [(0.0, 2), (0.5, 0), (0.999, -2)])
def test_translation_moves_by_up_to_an_eighth_and_fills_with_zeros(images, draw, shift):
    down = diffaugment(images[:1], draws_of(down=draw), ["translation"])
    expected = torch.roll(images[:1], shift, dims=2)
    if shift:
        expected[:, :, slice(0, shift) if shift > 0 else slice(shift, None)] = 0
    assert torch.equal(down, expected)

    right = diffaugment(images[:1].mT.contiguous(), draws_of(right=draw), ["translation"])
    assert torch.equal(right, expected.mT)


@pytest.mark.parametrize(
    ("row", "column", "rows", "columns"),
    [
        (0.0, 0.0, slice(0, 4), slice(0, 6)),
        (0.999, 0.999, slice(12, 16), slice(18, 24)),
        (0.5, 0.5, slice(4, 12), slice(6, 18)),
    ],
)
def test_cutout_hides_half_of_each_side_around_any_center(images, row, column, rows, columns):
    expected = images[:1].clone()
    expected[:, :, rows, columns] = 0
    assert torch.equal(diffaugment(images[:1], draws_of(row=row, column=column), ["cutout"]), expected)


@pytest.mark.parametrize(("fraction", "rows", "columns"), [(0.25, slice(6, 10), slice(9, 15)), (0.0, [], [])])
def test_cutout_hides_the_asked_fraction_of_each_side(images, fraction, rows, columns):
    expected = images[:1].clone()
    expected[:, :, rows, columns] = 0
    assert torch.equal(diffaugment(images[:1], draws_of(), ["cutout"], cutout=fraction), expected)


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_augmentation_happens_where_its_own_draw_is_below_the_probability(images, name):
    draws = sample_diffaugment_draws(0, "fake", 0, range(3))
    always = diffaugment(images, draws, [name])
    draws[:, 7:] = 0.9
    draws[:, 7 + EVERYTHING.index(name)] = torch.tensor([0.29, 0.3, 0.31])
    sometimes = diffaugment(images, draws, EVERYTHING, probability=0.3)
    assert torch.equal(sometimes[0], always[0]) and not torch.equal(always[0], images[0])
    assert torch.equal(sometimes[1:], images[1:])


def test_every_augmentation_happens_as_often_as_asked_and_independently():
    images = torch.full((2000, 1, 4, 4), 0.5)
    draws = sample_diffaugment_draws(0, "fake", 0, range(2000))
    changed = [
        (diffaugment(images, draws, [name], probability=0.5) != 0.5).any(-1).any(-1)[:, 0] for name in EVERYTHING
    ]
    color, _, cutout = changed
    for share, expected in ((color, 0.5), (cutout, 0.5), (color & cutout, 0.25)):
        assert share.float().mean() == pytest.approx(expected, abs=0.04)


def test_every_image_is_augmented_by_its_own_draws(images):
    draws = sample_diffaugment_draws(0, "fake", 0, range(3))
    together = diffaugment(images, draws, EVERYTHING)
    alone = torch.cat([diffaugment(images[i : i + 1], draws[i : i + 1], EVERYTHING) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


def test_switching_one_augmentation_off_does_not_move_the_others(images):
    draws = sample_diffaugment_draws(0, "fake", 0, range(3))
    without_color = diffaugment(images, draws, ["translation", "cutout"])
    hidden = diffaugment(torch.ones_like(images), draws, ["cutout"]) == 0
    assert hidden.any() and (without_color[hidden] == 0).all()
    in_steps = diffaugment(diffaugment(images, draws, ["color"]), draws, ["translation", "cutout"])
    assert torch.equal(diffaugment(images, draws, EVERYTHING), in_steps)
    assert torch.equal(diffaugment(images, draws, EVERYTHING[::-1]), in_steps)


@pytest.mark.parametrize("name", EVERYTHING)
def test_gradients_are_those_of_finite_differences(name):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    draws = sample_diffaugment_draws(0, "fake", 0, range(2))
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    loss = (diffaugment(images, draws, [name]) * weights).sum()
    (gradient,) = torch.autograd.grad(loss, images)
    # each augmentation is affine in the image, so that a finite difference is exact
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        moved = (diffaugment(images + direction, draws, [name]) * weights).sum()
    assert torch.allclose(moved - loss, (gradient * direction).sum(), atol=1e-3)
    assert gradient.abs().max() > 0


def test_bfloat16_images_give_float32(images):
    augmented = diffaugment(images.bfloat16(), sample_diffaugment_draws(0, "fake", 0, range(3)), EVERYTHING)
    assert augmented.dtype == torch.float32


def test_windows_cover_every_position():
    images = torch.arange(30.0).reshape(1, 1, 5, 6)
    corners = {
        take_windows(images, torch.tensor([[i / 16, j / 16]]), 4, 3)[0, 0, 0, 0].item()
        for i in range(16)
        for j in range(16)
    }
    assert corners == {0, 1, 2, 3, 6, 7, 8, 9}
    window = take_windows(images, torch.tensor([[0.999, 0.0]]), 4, 3)
    assert torch.equal(window, images[:, :, 1:5, 0:3])


def test_the_largest_draw_gives_the_last_position_at_any_size():
    for size in (*range(1, 300), 1023, 1024, 1025, 8191, 8192, 8193):
        images = torch.arange(float(size)).reshape(1, 1, size, 1)
        assert take_windows(images, torch.tensor([[1 - 2**-24, 0.0]]), 1, 1).item() == size - 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (["colour"], "`policy` names 'colour': choose from 'color', 'translation', 'cutout'"),
        (["color", "color"], "`policy` must name each augmentation once"),
        ("color,cutout", r"got the string 'color,cutout': write \['color', 'cutout'\]"),
    ],
)
def test_bad_policies_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        check_policy(policy)


def test_bad_shapes_are_refused(images):
    with pytest.raises(ValueError, match=r"`draws` must have shape \(3, 10\), got \(2, 10\)"):
        diffaugment(images, torch.zeros(2, 10), EVERYTHING)
    with pytest.raises(ValueError, match="`images` must have shape"):
        diffaugment(images[0], torch.zeros(3, 10), EVERYTHING)
