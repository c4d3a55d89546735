import copy
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer

from maetok_hf.training.discriminator import Discriminator


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}


def tiny_trunk(seed=0, **kwargs):
    torch.manual_seed(seed)
    return VisionTransformer(**SIZES | kwargs)


def tiny_discriminator(input_mode="resize", **kwargs):
    trunk = tiny_trunk(**kwargs)
    return Discriminator(trunk, input_mode)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def power_vectors(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers() if name.endswith(("._u", "._v"))}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_there_is_one_logit_for_each_patch_of_five_feature_maps(images):
    logits = tiny_discriminator()(images)
    assert logits.shape == (3, 5 * 16) and logits.dtype == torch.float32
    assert logits.std() > 0


@pytest.mark.parametrize(
    ("depth", "taps"), [(4, (1, 2, 3, 4)), (6, (2, 3, 5, 6)), (12, (3, 6, 9, 12)), (24, (6, 12, 18, 24))]
)
def test_features_are_taken_after_each_quarter_of_the_blocks(depth, taps):
    assert tiny_discriminator(depth=depth).taps == taps


@pytest.mark.parametrize("reg_tokens", [0, 3])
def test_features_are_those_of_the_trunk_with_the_class_token_added_to_the_patches(reg_tokens):
    discriminator = tiny_discriminator(depth=8, reg_tokens=reg_tokens)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    features = discriminator._features(images)
    intermediates = discriminator.trunk.forward_intermediates(
        images, [1, 3, 5, 7], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    assert len(features) == 5
    for feature, (patches, prefix) in zip(features[1:], intermediates, strict=True):
        assert torch.allclose(feature, (patches + prefix[:, :1]).mT, atol=1e-6)
    # no attention before the first block: a patch token knows its own pixels alone
    images[:, :, :8, :8] = 0
    changed = (discriminator._features(images)[0] != features[0]).any(dim=(0, 1))
    assert changed.tolist() == [True] + 15 * [False]


def test_dino_small_has_980_logits_and_heads_of_seven_million_parameters():
    torch.manual_seed(0)
    trunk = timm.create_model("vit_small_patch16_224.dino", pretrained=False)
    discriminator = Discriminator(trunk)
    assert discriminator.taps == (3, 6, 9, 12)
    with torch.no_grad():
        logits = discriminator(torch.rand(1, 3, 256, 256) * 2 - 1)
    assert logits.shape == (1, 5 * 14 * 14) and logits.isfinite().all()
    convolutions = 384 * 384 + 384 + 9 * 384 * 384 + 384 + 384 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == 5 * (convolutions + 4 * 384)


@pytest.mark.parametrize("training", [True, False])
def test_logits_do_not_depend_on_the_rest_of_the_batch(images, training):
    discriminator = tiny_discriminator().train(training)
    # from the same state: in training mode a forward pass advances the power iteration
    alone = torch.cat([copy.deepcopy(discriminator)(images[i : i + 1]) for i in range(3)])
    assert torch.allclose(copy.deepcopy(discriminator)(images), alone, atol=1e-5)
    neighbors = torch.cat([images[:1], torch.full_like(images[1:], 0.9)])
    assert torch.allclose(copy.deepcopy(discriminator)(neighbors)[0], alone[0], atol=1e-5)


def test_the_trunk_is_frozen_and_no_part_of_the_module():
    discriminator = tiny_discriminator()
    parameters = {id(parameter) for parameter in discriminator.trunk.parameters()}
    assert parameters.isdisjoint({id(parameter) for parameter in discriminator.parameters()})
    assert not any(parameter.requires_grad for parameter in discriminator.trunk.parameters())
    assert all(name.startswith("heads.") for name in discriminator.state_dict())
    assert not any(module is discriminator.trunk for module in discriminator.modules())
    discriminator.train()
    assert not any(module.training for module in discriminator.trunk.modules())


def test_state_dict_restores_the_logits_on_the_same_trunk(images):
    saved, fresh = tiny_discriminator().eval(), tiny_discriminator().eval()
    torch.manual_seed(5)
    fresh.heads = Discriminator(tiny_trunk()).eval().heads
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert not torch.allclose(fresh(images), saved(images), atol=1e-3)
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(images), saved(images))


def test_move_frozen_reaches_what_to_does_not():
    discriminator = tiny_discriminator().to(torch.float64)
    assert discriminator.trunk.cls_token.dtype == torch.float32
    assert discriminator.move_frozen("cpu", torch.bfloat16) is discriminator
    assert discriminator.trunk.cls_token.dtype == torch.bfloat16
    assert discriminator.trunk.cls_token.device.type == "cpu"


def test_a_low_precision_trunk_gives_float32_logits_near_those_of_full_precision(images):
    discriminator = tiny_discriminator().eval()
    full = discriminator(images)
    low = discriminator.move_frozen("cpu", torch.bfloat16)(images)
    assert low.dtype == torch.float32 and (low - full).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_logits_and_leaves_the_power_iteration_in_full_precision(images, dtype):
    discriminator, reference = tiny_discriminator(), tiny_discriminator()
    reference.load_state_dict(discriminator.state_dict())
    with torch.autocast("cpu", dtype):
        logits = discriminator(images)
    assert logits.dtype == torch.float32 and (logits - reference(images)).abs().max() < 0.1
    assert same(power_vectors(discriminator), power_vectors(reference))


def test_only_a_forward_pass_in_training_mode_advances_the_power_iteration(images):
    discriminator = tiny_discriminator()
    before = power_vectors(discriminator)
    assert len(before) == 5 * 3 * 2
    discriminator.eval()(images)
    assert same(power_vectors(discriminator), before)
    discriminator.train()(images)
    assert not same(power_vectors(discriminator), before)


def test_weights_of_the_heads_have_spectral_norm_one():
    discriminator = tiny_discriminator().eval()
    for head in discriminator.heads:
        for convolution in (head.project[0], head.mix[0], head.logit):
            assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_judge_gives_the_logits_of_forward(images, training):
    discriminator = tiny_discriminator().train(training)
    judged = discriminator.judge(images)
    assert torch.equal(judged, discriminator(images))


@pytest.mark.parametrize("training", [True, False])
def test_judge_changes_nothing_and_gives_a_gradient_to_the_images_alone(images, training):
    discriminator = tiny_discriminator().train(training)
    before = snapshot(discriminator)
    fake = images.clone().requires_grad_()
    discriminator.judge(fake).sum().backward()
    assert same(snapshot(discriminator), before)
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    assert all(parameter.grad is None for parameter in discriminator.trunk.parameters())
    assert fake.grad.abs().max() > 0


def test_a_step_along_the_gradient_of_judge_raises_the_logits(images):
    discriminator = tiny_discriminator().eval()
    fake = images.clone().requires_grad_()
    before = discriminator.judge(fake).mean()
    before.backward()
    with torch.no_grad():
        assert discriminator.judge(fake + 0.1 * fake.grad / fake.grad.norm()).mean() > before


def test_images_are_normalised_by_the_statistics_of_the_trunk():
    trunk = tiny_trunk()
    trunk.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.125)}
    discriminator = Discriminator(trunk)
    gray = torch.zeros(1, 3, 32, 32)
    # 0 in [-1, 1] is 0.5 in [0, 1]
    expected = torch.tensor([0.4 / 0.5, 0.3 / 0.25, 0.2 / 0.125])
    assert torch.allclose(discriminator._fit(gray, None)[0, :, 3, 4], expected)
    # ImageNet's where the trunk has none
    plain = Discriminator(tiny_trunk())._fit(gray, None)[0, :, 3, 4]
    assert torch.allclose(plain, torch.tensor([0.015 / 0.229, 0.044 / 0.224, 0.094 / 0.225]), atol=1e-5)


def test_images_of_the_size_of_the_trunk_are_not_resampled():
    discriminator = tiny_discriminator()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert torch.equal(discriminator._fit(images, None), (images - discriminator.mean) / discriminator.std)


@pytest.mark.parametrize("size", [(64, 64), (40, 56), (16, 16)])
def test_resizing_keeps_a_flat_image_flat_at_any_size(size):
    fitted = tiny_discriminator()._fit(torch.full((1, 3, *size), 0.25), None)
    assert fitted.shape == (1, 3, 32, 32)
    assert torch.allclose(fitted, fitted[:, :, :1, :1].expand_as(fitted), atol=1e-5)


def test_crop_takes_the_window_of_its_draws(images):
    crop, whole = tiny_discriminator("crop").eval(), tiny_discriminator().eval()
    # 17 tops and 9 lefts
    draws = torch.tensor([[0.0, 0.0], [0.999, 0.999], [8.5 / 17, 3.5 / 9]])
    windows = torch.stack([images[0, :, :32, :32], images[1, :, 16:, 8:], images[2, :, 8:40, 3:35]])
    assert torch.equal(crop._fit(images, draws), whole._fit(windows, None))


def test_crop_resizes_images_that_are_too_small():
    crop, whole = tiny_discriminator("crop").eval(), tiny_discriminator().eval()
    images = torch.rand(2, 3, 48, 24, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(crop._fit(images, torch.rand(2, 2)), whole._fit(images, None))


def test_crop_draws_are_asked_for_exactly_where_they_are_used(images):
    with pytest.raises(ValueError, match="`crop_draws` is needed with `input_mode='crop'`"):
        tiny_discriminator("crop")(images)
    with pytest.raises(ValueError, match="`crop_draws` has no meaning with `input_mode='resize'`"):
        tiny_discriminator()(images, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"`crop_draws` must have shape \(3, 2\), got \(2, 2\)"):
        tiny_discriminator("crop").judge(images, torch.zeros(2, 2))


def test_images_of_a_wrong_shape_are_refused(images):
    with pytest.raises(ValueError, match="`images` must have shape"):
        tiny_discriminator()(images[:, :1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Discriminator(torch.nn.Linear(1, 1)), "must be a vision transformer of timm, got Linear"),
        (lambda: tiny_discriminator(depth=3), "`trunk` must have at least 4 blocks, got 3"),
        (lambda: tiny_discriminator(class_token=False, global_pool="avg"), "`trunk` must have a class token"),
        (lambda: tiny_discriminator("pad"), "`input_mode` must be one of 'resize', 'crop', got 'pad'"),
    ],
)
def test_bad_trunks_and_modes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def save_trunk(folder, trunk):
    """A folder as timm's models are stored on the Hub."""
    statistics = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.25, 0.125]}
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "model_args": SIZES,
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 0, "first_conv": "patch_embed.proj"} | statistics,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(trunk.state_dict(), folder / "model.safetensors")


def test_a_trunk_is_loaded_from_a_folder(tmp_path):
    trunk = tiny_trunk(seed=3)
    save_trunk(tmp_path, trunk)
    discriminator = Discriminator.from_timm(f"local-dir:{tmp_path}", input_mode="crop")
    assert same(discriminator.trunk.state_dict(), trunk.state_dict())
    assert discriminator.input_mode == "crop" and discriminator.image_size == (32, 32)
    assert torch.allclose(discriminator.mean.flatten(), torch.tensor([-0.8, -0.6, -0.4]))
    assert torch.allclose(discriminator.std.flatten(), torch.tensor([1.0, 0.5, 0.25]))


def test_a_trunk_is_loaded_for_another_image_size(tmp_path, images):
    save_trunk(tmp_path, tiny_trunk(seed=3))
    discriminator = Discriminator.from_timm(f"local-dir:{tmp_path}", image_size=24)
    assert discriminator.image_size == (24, 24)
    assert discriminator(images).shape == (3, 5 * 9)


def test_missing_weights_are_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match="could not be loaded: Config file not found.*local-dir:/path/to/folder"):
        Discriminator.from_timm(f"local-dir:{tmp_path}")
    save_trunk(tmp_path, tiny_trunk())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match="could not be loaded: No suitable checkpoints found"):
        Discriminator.from_timm(f"local-dir:{tmp_path}")
    with pytest.raises(OSError, match=r"could not be loaded: Unknown model \(vit_nonesuch\)"):
        Discriminator.from_timm("vit_nonesuch")


def test_compiled_blocks_judge_and_teach_the_same_by_one_graph_a_kind_of_pass(images):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    plain, compiled = tiny_discriminator(depth=8), tiny_discriminator(depth=8)
    torch.compiler.reset()
    compiled.compile_repeated_blocks(fullgraph=True, backend=backend)
    found = []
    for discriminator in (plain, compiled):
        shown = images.clone().requires_grad_()
        judged = discriminator.judge(shown)
        (gradient,) = torch.autograd.grad(judged.sum(), shown)
        logits = discriminator(images)
        logits.sum().backward()
        found.append([judged, gradient, logits, *(parameter.grad for parameter in discriminator.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # the first block is given tokens of images without a gradient in one of the two kinds of pass
    assert 1 <= len(graphs) <= 2
