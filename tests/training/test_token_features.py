"""Cached features give the loss that the frozen model gives, and are refused where they are another's."""

import json
import logging
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from maetok_hf import SiTTransformer1DModel
from maetok_hf.training.alignment import FeatureAlignment
from maetok_hf.training.flow_matching import FlowMatchingObjective
from maetok_hf.training.generator_parts import make_flow_objective, make_transformer
from maetok_hf.training.latent_encoding import resolve_commit
from maetok_hf.training.sit_recipe import SiTRecipe
from maetok_hf.training.targets import HOGTarget
from maetok_hf.training.teachers import TeacherTarget, load_teacher
from maetok_hf.training.token_features import (
    TokenFeatureEncoder,
    check_cached_features,
    find_stored_teacher,
    load_cached_teacher,
    mean_directions,
    stored_digest,
    teacher_identity,
)
from tests.documentation import check_command
from tests.networks import save_networks
from tests.testing_utils import tiny_autoencoder


NUM_TOKENS, WIDTH, FEATURE_DIM = 4, 16, 24
HALF = 2.0**-11  # what float16 may change of a number of size 1


def make_target(seed=0, **options):
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Conv2d(3, FEATURE_DIM, 4, stride=4), nn.Flatten(2))
    settings = {"patch_size": 4, "dtype": torch.float32} | options
    patches = _Transposed(teacher)
    return TeacherTarget(patches, FEATURE_DIM, 4, (0.5,) * 3, (0.5,) * 3, **settings)


class _Transposed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).transpose(1, 2)


def make_images(count=5, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_alignment(target):
    torch.manual_seed(2)
    feature_dim = FEATURE_DIM if target is None else None
    return FeatureAlignment(target, WIDTH, layer=1, hidden_size=8, feature_dim=feature_dim)


@pytest.mark.parametrize("num_tokens", [1, 4, 16])
def test_loss_and_gradients_are_those_of_the_image(num_tokens):
    target, images = make_target(), make_images()
    exact = mean_directions(target(images), num_tokens)
    found = []
    for alignment, source in ((make_alignment(target), images), (make_alignment(None), exact)):
        hidden_states = torch.randn(5, num_tokens, WIDTH, generator=torch.Generator().manual_seed(3))
        loss = alignment(hidden_states.requires_grad_(), source)
        loss.sum().backward()
        found.append((loss.detach(), hidden_states.grad, alignment.projector[0].weight.grad))
    assert found[0][0].std() > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_storing_in_float16_changes_the_loss_by_no_more_than_its_rounding():
    target, images = make_target(), make_images()
    stored = TokenFeatureEncoder(target, 2, NUM_TOKENS)(images)
    assert stored.dtype == torch.float16 and stored.shape == (2, 5, NUM_TOKENS, FEATURE_DIM)
    hidden_states = torch.randn(5, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(3))
    for view, features in zip((images, images.flip(-1)), stored, strict=True):
        expected, found = (
            make_alignment(one)(hidden_states, source) for one, source in ((target, view), (None, features))
        )
        difference = (expected - found).abs().max()
        assert 0 < difference < HALF
    assert not torch.equal(*stored), "the mirrored image has other features"
    assert torch.equal(TokenFeatureEncoder(target, 1, NUM_TOKENS)(images), stored[:1])


def test_a_mean_of_directions_is_shorter_than_one_and_is_not_normalised():
    features = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [3.0, 4.0], [0.0, 0.0]]])
    assert torch.equal(mean_directions(features, 2), torch.tensor([[[0.5, 0.5], [0.3, 0.4]]]))
    with pytest.raises(ValueError, match="4 patches are no multiple of 3 tokens"):
        mean_directions(features, 3)


def test_objective_takes_the_features_in_place_of_the_images():
    target, images = make_target(), make_images()
    torch.manual_seed(0)
    sizes = {"sample_size": NUM_TOKENS, "in_channels": 3, "num_layers": 2, "num_attention_heads": 2}
    transformer = SiTTransformer1DModel(**sizes, attention_head_dim=8, num_classes=5)
    inputs = {
        "latents": torch.randn(5, NUM_TOKENS, 3),
        "class_labels": torch.arange(5),
        "draw": torch.rand(5),
        "noise": torch.randn(5, NUM_TOKENS, 3),
    }
    features = TokenFeatureEncoder(target, 1, NUM_TOKENS)(images)[0]
    with_images = FlowMatchingObjective(transformer, alignment=make_alignment(target))
    cached = FlowMatchingObjective(transformer, alignment=make_alignment(None)).move_frozen("cpu")
    one, other = with_images(**inputs, pixel_values=images), cached(**inputs, token_features=features)
    assert torch.equal(one["velocity"], other["velocity"])
    assert 0 < abs(one["alignment"] - other["alignment"]) < HALF
    for objective, name, given in (
        (cached, "token_features", {}),
        (with_images, "pixel_values", {}),
        (cached, "pixel_values", {"pixel_values": images, "token_features": features}),
        (with_images, "token_features", {"pixel_values": images, "token_features": features}),
    ):
        what = "is needed by" if name not in given else "has no effect without"
        with pytest.raises(ValueError, match=f"`{name}` {what}"):
            objective(**inputs, **given)
    with pytest.raises(ValueError, match=r"`token_features` must have shape \(5, 4, 24\), .* got \(5, 2, 24\)"):
        cached(**inputs, token_features=features[:, :2])


def test_an_alignment_has_a_target_or_the_number_of_features():
    for target, feature_dim in ((None, None), (make_target(), 3)):
        with pytest.raises(ValueError, match="give one of the two"):
            FeatureAlignment(target, WIDTH, feature_dim=feature_dim)
    with pytest.raises(ValueError, match="`feature_dim` must be positive, got 0"):
        FeatureAlignment(None, WIDTH, feature_dim=0)


def test_no_model_is_loaded_for_cached_features_and_the_projector_is_the_same(tmp_path):
    source = save_networks(tmp_path)["dinov2_model"]
    model = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    settings = {"alignment_weight": 0.5, "alignment_layer": 1, "resolution": 32, "model": model}
    projectors = []
    for name, feature_dim in ((source, None), ("nowhere", 32)):
        recipe = SiTRecipe(**settings, alignment_model=name)
        transformer = make_transformer(recipe, (4, 3), 5, seed=0)
        objective = make_flow_objective(recipe, transformer, 16, seed=0, cached_feature_dim=feature_dim)
        projectors.append(objective.alignment.projector.state_dict())
    for name, value in projectors[0].items():
        assert torch.equal(value, projectors[1][name])
    with pytest.raises(ValueError, match="9 patches are no multiple of 4 tokens"):
        make_flow_objective(SiTRecipe(**settings | {"resolution": 48}), transformer, 16, 0, cached_feature_dim=32)


def test_identity_changes_with_weights_precision_and_statistics(tmp_path):
    path = tmp_path / "teacher"
    path.mkdir()
    known = teacher_identity(make_target(), str(path))
    assert known == teacher_identity(make_target(), str(path))
    assert (known["model"], known["dtype"]) == ("teacher", "float32")
    others = [make_target(1), make_target(dtype=torch.bfloat16)]
    others.append(TeacherTarget(make_target().teacher, FEATURE_DIM, 4, (0.4,) * 3, (0.5,) * 3, 4, dtype=torch.float32))
    assert len({teacher_identity(other, "x")["digest"] for other in others} | {known["digest"]}) == 4


def test_a_commit_of_the_hub_is_the_teacher_that_is_loaded(tmp_path, hub):
    save_networks(tmp_path)
    repository = hub.add("user/dinov2")
    repository.commit("weights", {path.name: path.read_bytes() for path in (tmp_path / "dinov2").iterdir()})
    commit, tokenizer = repository.sha, tiny_autoencoder(num_latent_tokens=4)
    settings = json.loads((tmp_path / "dinov2" / "preprocessor_config.json").read_text())
    changed = json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}).encode()
    repository.commit("statistics", repository.files | {"preprocessor_config.json": changed})
    place = ("user/dinov2", "float32", tokenizer, tokenizer.config.sample_size)
    old, new = (load_cached_teacher(*place, revision=revision) for revision in (commit, None))
    local = load_cached_teacher(str(tmp_path / "dinov2"), *place[1:])
    assert torch.equal(old.shift, local.shift) and not torch.equal(new.shift, old.shift)


def test_teacher_that_cannot_be_used_is_refused_before_it_is_loaded():
    with pytest.raises(ValueError, match="`alignment_model` needs the patches of an AutoencoderMAE, .* is a Linear"):
        load_cached_teacher("nowhere", "float32", nn.Linear(1, 1), 16)
    tokenizer = tiny_autoencoder(sample_size=16)
    num_tokens = tokenizer.config.num_latent_tokens
    with pytest.raises(ValueError, match=f"no multiple of {num_tokens} tokens"):
        load_cached_teacher("nowhere", "float32", tokenizer, tokenizer.config.patch_size)
    with pytest.raises(ValueError, match="compared by 'cosine', not by 'mse'"):
        TokenFeatureEncoder(HOGTarget(), 1, 4)


def test_features_that_are_not_finite_are_refused():
    target = make_target()
    with torch.no_grad():
        target.teacher.model[0].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="`alignment_model` gives features that are not finite"):
        TokenFeatureEncoder(target, 1, NUM_TOKENS)(make_images())


METADATA = {
    "dataset": {"name": "user/images", "config_name": None, "revision": None},
    "split": "train",
    "resolution": 256,
    "num_views": 1,
    "dtype": "float16",
    "mixed_precision": "no",
}
ALIGNMENT = {"model": "facebook/dinov2-base", "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "hold none"),
        (ALIGNMENT | {"model": "facebook/dinov2-large"}, "hold those of 'facebook/dinov2-large' in bfloat16"),
        (ALIGNMENT | {"dtype": "float32"}, "hold those of 'facebook/dinov2-base' in float32"),
    ],
)
def test_features_of_another_model_are_refused_with_the_command_that_makes_them(found, message):
    metadata = METADATA if found is None else METADATA | {"alignment": found}
    recipe = SiTRecipe(alignment_weight=0.5)
    with pytest.raises(ValueError, match=message) as caught:
        check_cached_features(metadata, recipe, "runs/tokenizer", "the latents in 'here'", 16)
    text = str(caught.value)
    assert "needs features of 'facebook/dinov2-base' in bfloat16, but the latents in 'here' hold" in text
    assert ("of the cache" in text) == (found is not None)
    command = next(line.strip() for line in text.splitlines() if "cache_latents.py" in line)
    check_command(shlex.split(command))
    assert "--tokenizer_name_or_path runs/tokenizer --dataset_name user/images" in command
    assert "--random_flip false" in command and "--alignment_model facebook/dinov2-base" in command


PATCH_SIZE = 16


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    save_networks(folder)
    return folder


@pytest.fixture
def cached(networks, tmp_path):
    """A folder with a teacher, and what a cache says of its features."""
    folder = shutil.copytree(networks / "dinov2", tmp_path / "dinov2")
    return folder, describe_cache(load(folder), folder)


def load(name):
    return load_teacher("dinov2", name, PATCH_SIZE, dtype=torch.float32)


def describe_cache(target, folder, name=None):
    alignment = teacher_identity(target, name or str(folder)) | {"revision": None}
    return METADATA | {"alignment": alignment | {"stored_digest": stored_digest(folder)}}


def check(metadata, model):
    recipe = SiTRecipe(alignment_weight=0.5, alignment_model=str(model), alignment_dtype="float32")
    check_cached_features(metadata, recipe, "runs/tokenizer", "the latents in 'here'", PATCH_SIZE)


def forbid_loading(monkeypatch):
    def fail(*arguments, **settings):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr("maetok_hf.training.token_features.load_teacher", fail)


def test_a_copy_of_the_teacher_is_recognised_without_loading_it(cached, tmp_path, monkeypatch, caplog):
    folder, metadata = cached
    shutil.copytree(folder, tmp_path / "elsewhere" / "dinov2")
    forbid_loading(monkeypatch)
    check(metadata, folder)
    check(metadata, tmp_path / "elsewhere" / "dinov2")
    assert not caplog.records


@pytest.mark.parametrize("recorded", [True, False])
def test_the_same_weights_stored_in_another_way_are_recognised(cached, recorded, caplog):
    folder, metadata = cached
    if not recorded:
        del metadata["alignment"]["stored_digest"]
    else:
        path = folder / "model.safetensors"
        save_file(load_file(path), path, metadata={"format": "pt", "comment": "stored once more"})
        assert stored_digest(folder) != metadata["alignment"]["stored_digest"]
    check(metadata, folder)
    assert not caplog.records


@pytest.mark.parametrize("change", ["weights", "statistics"])
def test_another_teacher_of_the_same_name_is_refused(cached, tmp_path, change):
    folder, metadata = cached
    other = tmp_path / "elsewhere" / "dinov2"
    shutil.copytree(folder, other)
    if change == "weights":
        weights = load_file(other / "model.safetensors")
        weights["layernorm.bias"][0] += 1
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    else:
        settings = json.loads((other / "preprocessor_config.json").read_text())
        (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(ValueError, match="`alignment_model` '.*elsewhere/dinov2'.* other weights") as caught:
        check(metadata, other)
    text, digest = str(caught.value), teacher_identity(load(other), "x")["digest"]
    assert f"(digest {digest})" in text
    assert f"'dinov2' whose features the latents in 'here' hold (digest {metadata['alignment']['digest']})" in text
    command = next(line.strip() for line in text.splitlines() if "cache_latents.py" in line)
    check_command(shlex.split(command))
    assert f"--alignment_model {other}" in command


def test_a_teacher_that_is_not_here_is_compared_by_name_with_a_warning(cached, tmp_path, caplog):
    folder, metadata = cached
    with caplog.at_level(logging.WARNING):
        check(metadata, tmp_path / "gone" / "dinov2")
    assert len(caplog.records) == 1
    assert "by its name and precision alone" in caplog.text and "gone/dinov2" in caplog.text
    (folder / "model.safetensors").unlink()
    check(metadata, folder)
    assert len(caplog.records) == 2


def test_a_teacher_of_the_hub_is_looked_for_in_its_cache_only(cached, hub, monkeypatch, caplog):
    folder, _ = cached
    repository = hub.add("user/dinov2")
    repository.commit("weights", {path.name: path.read_bytes() for path in folder.iterdir()})
    name, tokenizer = "user/dinov2", tiny_autoencoder(num_latent_tokens=4)
    alignment = {"model": name, "dtype": "float32", "digest": "x", "stored_digest": "x", "revision": repository.sha}
    num_requests = len(hub.requests)
    check(METADATA | {"alignment": alignment}, name)
    assert len(hub.requests) == num_requests and "by its name and precision alone" in caplog.text
    caplog.clear()

    commit = resolve_commit(name)
    target = load_cached_teacher(name, "float32", tokenizer, tokenizer.config.sample_size, revision=commit)
    stored, num_requests = find_stored_teacher(name), len(hub.requests)
    metadata = describe_cache(target, stored, name)
    with pytest.raises(ValueError, match=f"digest x, commit {repository.sha} on the Hub"):
        check(METADATA | {"alignment": alignment}, name)
    with monkeypatch.context() as forbidden:
        forbid_loading(forbidden)
        check(metadata, name)
    assert len(hub.requests) == num_requests and not caplog.records
    (stored / "model.safetensors").unlink()
    (stored / "model-00001-of-00002.safetensors").touch()  # as after a download that did not end
    assert find_stored_teacher(name) == stored
    check(metadata, name)
    assert "by its name and precision alone" in caplog.text
    caplog.clear()
    (stored / "preprocessor_config.json").unlink()  # as after a download of the weights alone
    check(metadata, name)
    assert "by its name and precision alone" in caplog.text
