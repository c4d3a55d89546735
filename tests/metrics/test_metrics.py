"""The modules for `evaluate`, loaded from their folders, give what the functions of the library give."""

import runpy
from pathlib import Path

import evaluate
import numpy as np
import PIL.Image
import pytest
import torch

from maetok_hf.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    load_moments,
    precision_recall,
    save_moments,
)
from maetok_hf.metrics import NAMES, metric_folder
from tests.evaluation.networks import TinyExtractor, random_images
from tests.testing_utils import seeded_normal


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """One folder for the copies that `evaluate` imports, as Python knows one of its name."""
    return str(tmp_path_factory.mktemp("modules"))


@pytest.fixture
def load(tmp_path, monkeypatch, modules):
    """`evaluate.load` of a folder, with all that it writes in temporary ones."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", modules)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    return lambda name, **options: evaluate.load(metric_folder(name), cache_dir=str(tmp_path / "cache"), **options)


def moments(rows: torch.Tensor) -> Moments:
    """Without the library's own accumulator."""
    return Moments(rows.double().mean(dim=0), torch.from_numpy(np.cov(rows.double().numpy().T)), len(rows))


GENERATED, REAL = seeded_normal(40, 6) * 2 + 1, seeded_normal(25, 6, seed=1)


@pytest.mark.parametrize("kind", [torch.Tensor.double, torch.Tensor.float, torch.Tensor.numpy, torch.Tensor.tolist])
def test_fid_of_sets_of_different_sizes(load, kind):
    found = load("fid").compute(predictions=kind(GENERATED), references=kind(REAL))
    assert found == {"fid": pytest.approx(frechet_distance(moments(GENERATED), moments(REAL)), rel=1e-9)}


def test_batches_of_any_kind_add_up(load):
    fid = load("fid", keep_in_memory=True)
    fid.add_batch(predictions=GENERATED[:30])
    fid.add_batch(references=REAL[:3], predictions=GENERATED[30:39])
    fid.add(prediction=GENERATED[39])
    fid.add_batch(references=REAL[3:24])
    fid.add(reference=REAL[24])
    fid.add_batch(predictions=[], references=REAL[:0])  # of a loader whose last batch is empty
    assert fid.compute() == {"fid": pytest.approx(frechet_distance(moments(GENERATED), moments(REAL)), rel=1e-9)}


def test_fid_keeps_the_digits_of_float64(load):
    offset = 1e7  # float32 would round the features to integers
    rows = REAL.double() + offset
    moved = rows + torch.tensor([0.125, 0, 0, 0, 0, 0])
    assert load("fid").compute(predictions=moved, references=rows)["fid"] == pytest.approx(0.125**2, rel=1e-6)


def test_statistics_of_no_known_network_are_not_compared_with_those_of_another(load, tmp_path):
    found = moments(REAL)
    np.savez(tmp_path / "adm.npz", mu=found.mean.numpy(), sigma=found.covariance.numpy())
    fid = load("fid", extractor=TinyExtractor())
    with pytest.raises(ValueError, match="taken for Inception's, and the extractor is 'tiny'"):
        fid.compute(predictions=random_images(4), reference_statistics=str(tmp_path / "adm.npz"))


def test_fid_against_a_file_of_statistics(load, tmp_path):
    save_moments(tmp_path / "reference.npz", {"pool": moments(REAL)}, {"extractor": "other"})
    fid = load("fid")
    path = str(tmp_path / "reference.npz")
    found = fid.compute(predictions=GENERATED, reference_statistics=path)["fid"]
    assert found == pytest.approx(frechet_distance(moments(GENERATED), load_moments(path)[0]["pool"]), rel=1e-9)
    with pytest.raises(ValueError, match="either `references` or `reference_statistics`"):
        load("fid").compute(predictions=GENERATED, references=REAL, reference_statistics=path)
    with pytest.raises(ValueError, match="of another protocol"):
        load("fid", extractor=TinyExtractor()).compute(predictions=random_images(4), reference_statistics=path)


def test_inception_score_of_splits_in_their_order(load):
    found = load("inception_score").compute(predictions=GENERATED, split_size=15)
    mean, deviation = inception_score(GENERATED, 15)
    assert found == {"inception_score": pytest.approx(mean), "inception_score_std": pytest.approx(deviation)}
    assert deviation > 0


def test_precision_recall(load):
    found = load("precision_recall").compute(predictions=GENERATED, references=REAL, num_neighbors=4)
    precision, recall = precision_recall(GENERATED, REAL, 4)
    assert found == {"precision": precision, "recall": recall}
    assert 0 < precision < 1


@pytest.mark.parametrize("kind", ["tensor", "array", "paths", "pil", "arrays"])
def test_images_become_features_when_they_are_added(load, kind, tmp_path):
    images = random_images(7)
    arrays = images.permute(0, 2, 3, 1).numpy()
    paths = [tmp_path / f"{number}.png" for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        PIL.Image.fromarray(array).save(path)
    given = {
        "tensor": images,
        "array": arrays,
        "paths": [paths[0], *map(str, paths[1:])],
        "pil": [PIL.Image.open(path) for path in paths],
        "arrays": list(arrays),
    }[kind]
    extractor = TinyExtractor()
    metric = load("inception_score", extractor=extractor, batch_size=3)
    expected = torch.cat([extractor(part)["logits"] for part in images.split(3)])
    found = metric.compute(predictions=given)
    assert found["inception_score"] == pytest.approx(inception_score(expected.double())[0], rel=1e-12)


def test_precision_recall_of_images(load):
    extractor, generated, real = TinyExtractor(), random_images(12), random_images(9, seed=1)
    metric = load("precision_recall", extractor=extractor)
    metric.add_batch(predictions=generated, references=real)
    expected = precision_recall(extractor(generated)["pool"], extractor(real)["pool"])
    assert metric.compute() == dict(zip(("precision", "recall"), expected, strict=True))


@pytest.mark.parametrize(
    "given,message",
    [
        (torch.zeros(4, 3, 8, 8), "must be feature vectors of shape .n, dim., got shape .4, 3, 8, 8.: for images"),
        (["a.png"], "must be feature vectors"),
        ([[1.0, 2.0], [1.0]], "must be feature vectors"),
        (torch.full((2, 3), torch.inf), "not finite"),
    ],
)
def test_what_is_no_feature_is_refused(load, given, message):
    with pytest.raises(ValueError, match=f"`predictions` .*{message}"):
        load("fid").add_batch(predictions=given)


def test_vectors_of_different_lengths_are_refused(load):
    fid = load("fid")
    fid.add_batch(predictions=GENERATED, references=REAL)
    fid.add_batch(predictions=GENERATED[:, :5])
    with pytest.raises(ValueError, match="`predictions` has vectors of 6 numbers and others"):
        fid.compute()
    with pytest.raises(ValueError, match="`references` is empty"):
        load("fid").compute(predictions=GENERATED)


def test_images_must_be_of_one_size_and_8_bit(load):
    fid = load("fid", extractor=TinyExtractor())
    images = [np.zeros((12, 12, 3), np.uint8), np.zeros((12, 13, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"`references` has images of shapes \[\(12, 12, 3\), \(12, 13, 3\)\]"):
        fid.add_batch(references=images)
    with pytest.raises(ValueError, match="got float64 of shape"):
        fid.add_batch(references=np.zeros((2, 12, 12, 3)))
    for tensor in (torch.rand(2, 3, 12, 12), torch.zeros(2, 12, 12, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"`references` must be images of uint8, as a tensor \(n, 3"):
            fid.add_batch(references=tensor)
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        load("fid", batch_size=0)


def test_there_is_no_other_module():
    with pytest.raises(ValueError, match="'fid', 'inception_score', 'precision_recall', got 'kid'"):
        metric_folder("kid")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_a_space(name, load):
    folder = Path(metric_folder(name))
    assert {path.name for path in folder.iterdir()} >= {f"{name}.py", "app.py", "requirements.txt", "README.md"}
    _, header, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert "sdk: gradio" in header and "- metric" in header and f'metric_folder("{name}")' in text
    runpy.run_path(str(folder / "app.py"))  # without starting it
    metric = load(name)
    assert metric.name == metric.info.module_name and "predictions" in metric.inputs_description
