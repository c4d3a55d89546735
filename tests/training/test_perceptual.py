import urllib.error
import warnings

import lpips
import pytest
import torch
from torchvision import models

from maetok_hf.training.perceptual import PerceptualLoss


def random_lpips():
    """The real network and heads on a random trunk."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False)


@pytest.fixture(scope="module")
def loss():
    return PerceptualLoss(random_lpips())


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.rand(3, 3, 32, 48, generator=generator) * 2 - 1 for _ in range(2))


def test_distances_are_those_of_lpips_one_per_image(loss, pair):
    distances = loss(*pair)
    assert distances.shape == (3,) and distances.dtype == torch.float32
    assert torch.equal(distances, random_lpips()(*pair).flatten())
    assert torch.allclose(loss(pair[0][1:2], pair[1][1:2]), distances[1:2])


def test_equal_images_are_at_no_distance_and_others_further_the_more_they_differ(loss, pair):
    images, other = pair
    distances = [loss(images + amount * (other - images), images).mean() for amount in (0, 0.1, 0.5)]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_descent_lowers_the_distance_and_only_reconstructions_get_a_gradient(loss, pair):
    reconstruction, images = (tensor.clone().requires_grad_() for tensor in pair)
    before = loss(reconstruction, images).sum()
    before.backward()
    assert images.grad is None
    with torch.no_grad():
        step = reconstruction - 0.01 * reconstruction.grad / reconstruction.grad.norm()
        assert loss(step, images).sum() < before


def test_it_is_frozen_and_stays_in_evaluation_mode(pair):
    loss = PerceptualLoss(random_lpips())
    before = loss(*pair)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    loss.train()
    assert loss.training and not any(module.training for module in loss.lpips.modules())
    # the heads hold dropout, which would change this
    assert torch.equal(loss(*pair), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(loss, pair, dtype):
    with torch.autocast("cpu", dtype):
        distances = loss(*pair)
    assert torch.equal(distances, loss(*pair))


def test_low_precision_reconstructions_give_float32_and_a_finite_gradient(loss, pair):
    reconstruction = pair[0].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distances = loss(reconstruction, pair[1])
    distances.sum().backward()
    assert distances.dtype == torch.float32 and reconstruction.grad.isfinite().all()


def test_features_that_are_all_zero_give_a_finite_gradient(pair):
    network = random_lpips()
    with torch.no_grad():
        network.net.slice1[0].bias.fill_(-30.0)
    reconstruction = pair[0].clone().requires_grad_()
    PerceptualLoss(network)(reconstruction, pair[1]).sum().backward()
    assert reconstruction.grad.isfinite().all()


def test_different_shapes_are_refused(loss, pair):
    with pytest.raises(ValueError, match=r"`reconstruction` has shape \(3, 3, 32, 48\) but `images` \(2, 3, 32, 48\)"):
        loss(pair[0], pair[1][:2])


def test_unknown_network_is_refused():
    with pytest.raises(ValueError, match="`network` must be one of 'vgg', 'alex', 'squeeze', got 'resnet'"):
        PerceptualLoss.from_pretrained("resnet")


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.parametrize(
    ("network", "file"),
    [("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth")],
)
def test_missing_weights_name_the_file_and_the_folder(offline_cache, network, file, recwarn):
    with pytest.raises(OSError, match="no network") as error:
        PerceptualLoss.from_pretrained(network)
    assert f"https://download.pytorch.org/models/{file}" in str(error.value)
    assert f"into {offline_cache} as {file}" in str(error.value)
    assert not recwarn.list


def test_cached_weights_are_loaded_without_a_word(offline_cache, pair, capsys, recwarn):
    torch.manual_seed(1)
    trunk = models.squeezenet1_1(weights=None)
    offline_cache.mkdir(parents=True)
    torch.save(trunk.state_dict(), offline_cache / "squeezenet1_1-b8a52dc0.pth")
    loss = PerceptualLoss.from_pretrained("squeeze")
    assert torch.equal(loss.lpips.net.slice1[0].weight, trunk.features[0].weight)
    assert loss(*pair).isfinite().all()
    assert capsys.readouterr() == ("", "") and not recwarn.list
