"""Extractors: real networks with random weights, and what is said when their files are missing."""

import hashlib
import os
import sys
import urllib.error

import pytest
import torch

from maetok_hf.evaluation import DINOv2Extractor, InceptionExtractor, inception_score, weights_digest
from maetok_hf.evaluation.extractors import INCEPTION_FILE, extractor_identity
from tests.evaluation.networks import TinyExtractor, random_images


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Weights of the shapes of the published ones, with a spread that does not let the features collapse."""
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"

    class Fresh(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Fresh("fresh", ["2048"], feature_extractor_weights_path=path)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return InceptionExtractor.from_file(inception_file)


def test_inception_gives_the_layers_of_the_suite_of_adm(inception):
    images = random_images(3, size=32)
    features = inception(images)
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pool": (3, 2048),
        "spatial": (3, 7 * 17 * 17),
        "logits": (3, 1008),
    }
    assert all((value[0] - value[1]).abs().max() > 0.01 for value in features.values())
    weight = inception.network.fc.weight
    torch.testing.assert_close(features["logits"], features["pool"] @ weight.T, rtol=1e-4, atol=1e-4)


def test_spatial_features_are_ordered_by_row_column_and_channel(inception):
    maps = []
    hook = inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[2].clone()))
    spatial = inception(random_images(2, size=32))["spatial"]
    hook.remove()
    assert maps[0].shape == (2, 192, 17, 17)
    for row, column, channel in ((0, 0, 1), (0, 1, 0), (3, 5, 6), (16, 16, 6)):
        assert torch.equal(spatial[:, (row * 17 + column) * 7 + channel], maps[0][:, channel, row, column])
    assert spatial.min() >= 0  # after the rectifier, as the node of that name in the graph


def test_inception_ignores_autocast(inception):
    images = random_images(1, size=32)
    plain = inception(images)["pool"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(inception(images)["pool"], plain)


def test_digest_of_inception_is_that_of_the_file(inception, inception_file):
    assert inception.digest == hashlib.sha256(inception_file.read_bytes()).hexdigest()


def test_wrong_images_are_refused(inception):
    for images in (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8 of shape \(n, 3, height, width\)"):
            inception(images)


def test_missing_weights_are_named_with_the_place_for_them(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(
        OSError, match=f"no network.*{INCEPTION_FILE} elsewhere and put it into {tmp_path}/checkpoints"
    ):
        InceptionExtractor.from_file()
    with pytest.raises(OSError, match=f"is no file: download https://github.com/.*{INCEPTION_FILE}"):
        InceptionExtractor.from_file(tmp_path / "nowhere.pth")


def test_missing_package_is_named_with_the_extra_that_has_it(monkeypatch):
    for module in ("torch_fidelity.feature_extractor_inceptionv3", "torch_fidelity.metric_isc"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call, package in (
        (InceptionExtractor.from_file, "torch-fidelity"),
        (lambda: DINOv2Extractor.from_pretrained("x"), "transformers"),
        (lambda: inception_score(torch.zeros(2, 2)), "torch-fidelity"),
    ):
        with pytest.raises(ImportError, match=rf"needs `{package}`.*install `maetok_hf\[evaluation\]`"):
            call()


class Payload:
    """What a file of weights must not be able to do."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_file_of_weights_cannot_run_code(tmp_path):
    pytest.importorskip("torch_fidelity")
    torch.save(Payload(str(tmp_path / "ran")), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of Inception"):
        InceptionExtractor.from_file(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14, initializer_range=0.5
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dinov2_gives_the_class_token_of_normalised_images(dinov2_folder):
    from transformers import Dinov2Model

    extractor = DINOv2Extractor.from_pretrained(dinov2_folder)
    images = random_images(2, size=224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder)(values).last_hidden_state[:, 0]
    found = extractor(images)["pool"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_dinov2_enlarges_small_images_within_8_bits(dinov2_folder):
    extractor = DINOv2Extractor.from_pretrained(dinov2_folder)
    checkers = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    checkers[..., ::2] = 255
    seen = []
    extractor.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    extractor(checkers)
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    levels = (seen[0]["pixel_values"] * std[:, None, None] + mean[:, None, None]) * 255
    assert levels.shape == (1, 3, 224, 224)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.min() > -1e-3
    assert levels.max() < 255.001


def test_digest_of_dinov2_changes_with_a_weight(dinov2_folder):
    first, second = (DINOv2Extractor.from_pretrained(dinov2_folder) for _ in range(2))
    assert first.digest == second.digest == weights_digest(second.model)
    with torch.no_grad():
        next(second.model.parameters()).view(-1)[0] += 1e-6
    assert first.digest != weights_digest(second.model)


def test_digest_sees_names_and_shapes():
    digests = set()
    for name, tensor in (("a", torch.zeros(4)), ("a", torch.zeros(2, 2)), ("b", torch.zeros(4)), ("a", torch.ones(4))):
        digests.add(weights_digest(torch.nn.ParameterDict({name: tensor})))
    assert len(digests) == 4


def test_missing_dinov2_is_named_with_what_to_do(tmp_path):
    with pytest.raises(OSError, match="nothing.*could not be loaded.*hf download"):
        DINOv2Extractor.from_pretrained(tmp_path / "nothing")


def test_model_of_another_kind_is_refused(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a model of type 'vit', not a DINOv2"):
        DINOv2Extractor.from_pretrained(tmp_path)


def test_features_are_identified_by_extractor_weights_and_resize():
    extractor = TinyExtractor()
    identity = extractor_identity(extractor)
    assert identity == {"extractor": "tiny", "extractor_digest": extractor.digest, "resize": "none"}
    assert extractor_identity(TinyExtractor(1)) != identity
