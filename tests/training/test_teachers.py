import logging
import types
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from maetok_hf.training.targets import feature_loss
from maetok_hf.training.teachers import TeacherTarget, load_teacher


WIDTH = 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = SIZES | {"intermediate_size": 64, "patch_size": 14, "image_size": 56}
TEXT = SIZES | {"intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": WIDTH}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
UNUSUAL = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def save(model, processor, folder):
    model.eval().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return model, str(folder)


def build_dinov2(folder, processor=None, **options):
    torch.manual_seed(0)
    return save(Dinov2Model(Dinov2Config(**SIZES, patch_size=14, image_size=56, **options)), processor, folder)


def build_siglip(folder, processor=None, **options):
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION | options))
    return save(model, processor, folder)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return build_dinov2(tmp_path_factory.mktemp("dinov2"), BitImageProcessor(**IMAGENET))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return build_siglip(tmp_path_factory.mktemp("siglip"), SiglipImageProcessor())


def random_images(height, width, seed=0):
    """8-bit images, as bytes and in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)
    return pixels, pixels.float() / 127.5 - 1


def pooled(size):
    """A teacher whose features are the mean colors of its patches."""
    return lambda images: nn.functional.avg_pool2d(images, size).flatten(2).transpose(1, 2)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def target_of(teacher, **options):
    defaults = {"feature_dim": 3, "teacher_patch_size": 14, **HALF, "patch_size": 16, "dtype": torch.float32}
    return TeacherTarget(teacher, **defaults | options)


def test_normalization_by_hand():
    target = target_of(pooled(4), teacher_patch_size=4, patch_size=4, **UNUSUAL)
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 8)
    expected = torch.tensor([(0 - 0.1) / 0.4, (0.5 - 0.2) / 0.5, (1 - 0.3) / 0.6])
    assert torch.allclose(target(image), expected.expand(1, 2, 3), atol=1e-6)


def test_images_are_not_resized_where_the_patches_are_equal():
    seen = []
    target = target_of(lambda images: seen.append(images) or pooled(8)(images), teacher_patch_size=8, patch_size=8)
    _, image = random_images(16, 24)
    target(image * 1.5)
    # statistics of 0.5 are those of [-1, 1], and nothing is clipped
    assert torch.allclose(seen[0], image * 1.5, atol=1e-6)


@pytest.mark.parametrize(
    ("patches", "image", "seen"),
    [
        ((14, 16), (256, 256), (224, 224)),
        ((14, 16), (512, 512), (448, 448)),
        ((14, 16), (384, 272), (336, 238)),
        ((14, 8), (16, 24), (28, 42)),
        ((16, 16), (256, 512), (256, 512)),
    ],
)
def test_the_teacher_sees_one_of_its_patches_for_each_of_the_tokenizer(patches, image, seen):
    shapes = []
    teacher_patch, patch = patches
    target = target_of(
        lambda images: shapes.append(tuple(images.shape[-2:])) or pooled(teacher_patch)(images),
        teacher_patch_size=teacher_patch,
        patch_size=patch,
    )
    features = target(torch.zeros(1, 3, *image))
    assert shapes == [seen] and features.shape == (1, image[0] * image[1] // patch**2, 3)


def test_every_size_that_is_whole_patches_gives_that_many_vectors():
    target = target_of(pooled(14))
    for side in range(16, 513, 16):
        assert target(torch.zeros(1, 3, side, 16)).shape == (1, side // 16, 3)


def test_resizing_keeps_every_patch_in_its_place():
    # 2 x 3 patches of one colour each: the middle of a patch is far from what mixes at its border
    colors = torch.tensor([[-1.0, -0.5, 0.0], [0.5, 1.0, -0.2]])
    image = colors.repeat_interleave(16, 0).repeat_interleave(16, 1).expand(1, 3, 32, 48)
    target = target_of(lambda images: images[:, :, 7::14, 7::14].flatten(2).transpose(1, 2))
    assert (target(image) - colors.flatten().view(1, 6, 1)).abs().max() < 0.02


def test_overshoots_of_resizing_are_clipped_to_the_range_of_images():
    seen = []
    target = target_of(lambda images: seen.append(images) or pooled(14)(images))
    image = torch.full((1, 3, 32, 32), -1.0)
    image[..., 16:] = 1.0
    target(image)
    overshoot = nn.functional.interpolate(image, (28, 28), mode="bicubic", antialias=True)
    assert overshoot.max() > 1.001 and torch.equal(seen[0], overshoot.clamp(-1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_module_is_frozen_cast_once_and_stays_in_evaluation_mode(dtype):
    teacher = nn.Sequential(nn.Conv2d(3, 5, 14, 14), nn.Dropout(0.5), nn.Flatten(2), Transposed()).train()
    target = TeacherTarget(teacher, 5, 14, **HALF, dtype=dtype)
    assert {(p.dtype, p.requires_grad) for p in target.parameters()} == {(dtype, False)}
    weights = [p.data_ptr() for p in target.parameters()]
    image = random_images(32, 48)[1]
    features = target(image)
    assert not target.train().training and not teacher[1].training
    assert torch.equal(target(image), features)  # no dropout
    assert weights == [p.data_ptr() for p in target.parameters()]


def test_normalization_is_no_state_to_save():
    assert not target_of(pooled(14)).state_dict()


def test_features_have_the_type_of_the_teacher_and_no_gradient():
    conv = nn.Conv2d(3, 5, 14, 14)
    target = target_of(lambda images: conv(images).flatten(2).transpose(1, 2), feature_dim=5)
    assert not target(torch.zeros(1, 3, 32, 32, requires_grad=True)).requires_grad
    low = TeacherTarget(nn.Sequential(conv, nn.Flatten(2), Transposed()), 5, 14, **HALF)
    features = low(torch.zeros(1, 3, 32, 32, dtype=torch.float16))
    assert features.dtype == torch.bfloat16 and not features.requires_grad


@pytest.mark.parametrize("loss_type", ["mse", "cosine"])
def test_a_step_on_the_prediction_lowers_the_loss_and_the_teacher_gets_no_gradient(loss_type):
    teacher = nn.Sequential(nn.Conv2d(3, 8, 14, 14), nn.Flatten(2), Transposed())
    target = TeacherTarget(teacher, 8, 14, **HALF, feature_loss=loss_type)
    image = random_images(32, 48)[1].requires_grad_()
    prediction = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = feature_loss(prediction, target(image), target.feature_loss).mean()
    loss.backward()
    assert image.grad is None and all(p.grad is None for p in teacher.parameters())
    stepped = prediction.detach() - 0.1 * prediction.grad
    assert feature_loss(stepped, target(image), loss_type).mean() < loss


def test_cosine_is_the_default_and_the_switch_is_checked():
    assert target_of(pooled(14)).feature_loss == "cosine"
    assert target_of(pooled(14), feature_loss="mse").feature_loss == "mse"
    with pytest.raises(ValueError, match="`feature_loss` must be one of"):
        target_of(pooled(14), feature_loss="l1")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda images: images[:, :, :5, 0].transpose(1, 2), r"got \(2, 5, 3\)"),  # a class token too many
        (lambda images: images[:, :2, :4, 0].transpose(1, 2), r"got \(2, 4, 2\)"),
        (lambda images: images, r"got \(2, 3, 28, 28\)"),
        (lambda images: {"last_hidden_state": images}, "got dict"),
    ],
)
def test_a_teacher_without_one_vector_per_patch_is_refused(teacher, message):
    with pytest.raises(ValueError, match=r"of shape \(2, 4, 3\), one vector for each of 2 x 2 patches.*" + message):
        target_of(teacher)(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 20), (2, 3, 0, 16)])
def test_images_that_are_not_whole_patches_are_refused(shape):
    with pytest.raises(ValueError, match="`pixel_values`"):
        target_of(pooled(14))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_dim": 0}, "`feature_dim` must be a positive integer, got 0"),
        ({"teacher_patch_size": [14, 14]}, r"`teacher_patch_size` must be a positive integer, got \[14, 14\]"),
        ({"patch_size": -16}, "`patch_size` must be a positive integer, got -16"),
        ({"image_mean": [0.5]}, "`image_mean` must be three numbers"),
        ({"image_std": [0.5, 0.0, 0.5]}, "`image_std` must be positive"),
        ({"dtype": torch.int8}, "`dtype` must be a floating-point type"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        target_of(pooled(14), **options)


def inputs_of(target, image):
    """What the model of transformers is given."""
    seen = []
    model = target.teacher.model
    handle = model.register_forward_pre_hook(lambda _, args, options: seen.append(options), with_kwargs=True)
    target(image)
    handle.remove()
    return seen[0]["pixel_values"]


def test_dinov2_equals_transformers_with_its_own_processor(dinov2):
    model, folder = dinov2
    pixels, image = random_images(56, 56)
    processor = BitImageProcessor.from_pretrained(folder)
    inputs = processor(list(pixels), do_resize=False, do_center_crop=False, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state[:, 1:]  # after the class token
    target = load_teacher("dinov2", folder, patch_size=14, dtype=torch.float32)
    assert target.feature_dim == WIDTH and target.feature_loss == "cosine"
    assert (target(image) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("processor", [SiglipImageProcessor(), SiglipImageProcessor(**UNUSUAL)])
def test_siglip_equals_transformers_with_its_own_processor(tmp_path, processor):
    model, folder = build_siglip(tmp_path, processor)
    pixels, image = random_images(56, 56)
    inputs = processor(list(pixels), do_resize=False, return_tensors="pt")
    with torch.no_grad():
        expected = model.vision_model(**inputs).last_hidden_state
    target = load_teacher("siglip", folder, patch_size=14, dtype=torch.float32, feature_loss="mse")
    assert target.feature_dim == WIDTH and target.feature_loss == "mse"
    assert (target(image) - expected).abs().max() < 1e-5


def test_registers_are_dropped_like_the_class_token(tmp_path):
    torch.manual_seed(0)
    config = Dinov2WithRegistersConfig(**SIZES, patch_size=14, image_size=56, num_register_tokens=4)
    model, folder = save(Dinov2WithRegistersModel(config), BitImageProcessor(**IMAGENET), tmp_path)
    target = load_teacher("dinov2", folder, patch_size=14, dtype=torch.float32)
    _, image = random_images(28, 42)
    with torch.no_grad():
        expected = model(inputs_of(target, image)).last_hidden_state[:, 5:]
    assert expected.shape[1] == 6 and torch.equal(target(image), expected)


@pytest.mark.parametrize(
    ("image", "seen"), [((64, 64), (56, 56)), ((128, 128), (112, 112)), ((96, 64), (84, 56)), ((16, 80), (14, 70))]
)
@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_positions_are_interpolated_to_the_grid_of_the_tokenizer(request, kind, image, seen):
    model, folder = request.getfixturevalue(kind)
    target = load_teacher(kind, folder, patch_size=16, dtype=torch.float32)
    _, image = random_images(*image)
    inputs = inputs_of(target, image)
    assert inputs.shape[-2:] == seen
    with torch.no_grad():
        if kind == "dinov2":
            expected = model(inputs).last_hidden_state[:, 1:]
        else:
            expected = model.vision_model(inputs, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(target(image), expected)


def test_each_teacher_has_its_own_normalization(dinov2, siglip):
    _, image = random_images(56, 56)
    seen = {
        kind: inputs_of(load_teacher(kind, folder, 14, dtype=torch.float32), image)
        for kind, (_, folder) in {"dinov2": dinov2, "siglip": siglip}.items()
    }
    assert torch.allclose(seen["siglip"], image, atol=1e-6)
    mean, std = (torch.tensor(IMAGENET[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    assert torch.allclose(seen["dinov2"], ((image + 1) / 2 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "build", "expected"), [("dinov2", build_dinov2, IMAGENET), ("siglip", build_siglip, HALF)]
)
def test_without_a_processor_the_statistics_are_those_of_the_kind_and_a_warning_says_so(
    tmp_path, caplog, kind, build, expected
):
    _, folder = build(tmp_path)
    target = load_teacher(kind, folder, 14)
    assert "no image processor that says how to normalise" in caplog.text
    by_hand = TeacherTarget(pooled(14), 3, 14, **expected)
    assert torch.equal(target.scale, by_hand.scale) and torch.equal(target.shift, by_hand.shift)


def test_a_damaged_processor_is_not_taken_for_none(tmp_path, caplog):
    _, folder = build_dinov2(tmp_path, BitImageProcessor(**IMAGENET))
    (processor,) = [file for file in tmp_path.glob("*processor*")]
    processor.write_text("{")
    with pytest.raises(OSError, match="(?s)could not be loaded.*check the path"):
        load_teacher("dinov2", folder)
    assert "no image processor" not in caplog.text


def test_a_processor_without_statistics_is_refused(tmp_path):
    _, folder = build_dinov2(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    with pytest.raises(ValueError, match="has no `image_std`: write those that the teacher was trained with"):
        load_teacher("dinov2", folder)


RESPONSE = types.SimpleNamespace(headers={}, request=None)


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A teacher in a repository whose image processor cannot be read: the download, to be given an answer."""
    _, folder = build_dinov2(tmp_path)
    for name in ("AutoConfig", "AutoModel"):
        loader = getattr(transformers, name).from_pretrained
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lambda _, load=loader, **kw: load(folder, **kw))
    # what transformers raises, whatever the reason
    processor = Mock(side_effect=OSError("Can't load image processor"))
    monkeypatch.setattr("transformers.ImageProcessingMixin.get_image_processor_dict", processor)
    download = Mock()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return download


def test_a_repository_without_a_processor_has_the_statistics_of_the_kind(repository, caplog):
    repository.side_effect = RemoteEntryNotFoundError("404", response=RESPONSE)
    by_hand = TeacherTarget(pooled(14), 3, 14, **IMAGENET)
    assert torch.equal(load_teacher("dinov2", "owner/name").scale, by_hand.scale)
    assert "owner/name has no image processor" in caplog.text


def test_what_the_cache_knows_to_be_missing_needs_no_connection(repository, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: huggingface_hub._CACHED_NO_EXIST)
    load_teacher("dinov2", "owner/name")
    assert not repository.called


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no connection"), HfHubHTTPError("503", response=RESPONSE)])
def test_a_processor_that_cannot_be_looked_up_is_an_error_that_says_what_to_do(repository, caplog, error):
    repository.side_effect = error
    with pytest.raises(OSError, match="(?s)could not be loaded.*download it first with `hf download owner/name`"):
        load_teacher("dinov2", "owner/name")
    assert "no image processor" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["dinov2", "siglip"])
def test_features_are_those_of_the_chosen_precision_whatever_autocast_says(request, kind, dtype):
    _, folder = request.getfixturevalue(kind)
    target = load_teacher(kind, folder, dtype=dtype)
    _, image = random_images(64, 32)
    features = target(image)
    assert features.dtype == dtype and {p.dtype for p in target.teacher.parameters()} == {dtype}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(target(image), features)
    full = load_teacher(kind, folder, dtype=torch.float32)(image)
    similarity = -feature_loss(features, full, "cosine")
    assert similarity.min() > 0.99


def test_a_full_siglip_and_its_vision_tower_alone_are_the_same_teacher_without_the_text_tower(siglip, tmp_path):
    model, folder = siglip
    _, tower = save(model.vision_model, SiglipImageProcessor(), tmp_path)
    full, alone = load_teacher("siglip", folder), load_teacher("siglip", tower)
    _, image = random_images(32, 32)
    assert torch.equal(full(image), alone(image))
    names = [name for name, _ in full.teacher.named_parameters()]
    assert names and not any("text" in name or "head" in name for name in names)
    loaded = sum(p.numel() for p in full.teacher.parameters())
    pooling = sum(p.numel() for p in model.vision_model.head.parameters())
    assert loaded == sum(p.numel() for p in model.vision_model.parameters()) - pooling


def test_the_text_tower_that_is_left_out_is_not_reported_as_a_fault(siglip, caplog):
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    level = library.level
    load_teacher("siglip", siglip[1])
    library.removeHandler(caplog.handler)
    assert "UNEXPECTED" not in caplog.text and library.level == level


def test_a_model_of_another_kind_is_refused(dinov2, siglip):
    with pytest.raises(ValueError, match="is a model of type 'siglip', but `kind` 'dinov2' stands for"):
        load_teacher("dinov2", siglip[1])
    with pytest.raises(ValueError, match="is a model of type 'dinov2', but `kind` 'siglip' stands for"):
        load_teacher("siglip", dinov2[1])
    with pytest.raises(ValueError, match="`kind` must be one of 'dinov2', 'siglip', got 'clip'"):
        load_teacher("clip", dinov2[1])


def test_a_missing_model_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"(?s)missing.*check the path.*`hf download .*leave this target out"):
        load_teacher("dinov2", tmp_path / "missing")


def test_weights_are_read_from_safetensors_only(tmp_path):
    model, folder = build_dinov2(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="(?s)could not be loaded.*weights as safetensors"):
        load_teacher("dinov2", folder)


def test_damaged_weights_are_named(tmp_path):
    _, folder = build_dinov2(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="(?s)could not be loaded.*download it first"):
        load_teacher("dinov2", folder)


def test_a_teacher_is_never_left_with_random_weights(tmp_path):
    model, folder = build_dinov2(tmp_path)
    state = {k: v for k, v in model.state_dict().items() if "layernorm.weight" not in k}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its model \(layernorm.weight"):
        load_teacher("dinov2", folder)
