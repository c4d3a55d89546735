"""The command: the numbers of exactly the images that were asked for, wherever they come from, with their protocol."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import PartialState

from maetok_hf.commands import evaluate_generation
from maetok_hf.evaluation import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    kernel_distance_of_subsets,
    precision_recall,
)
from maetok_hf.evaluation.protocol import CENTER_CROP
from maetok_hf.sampling import draw_labels, generate_images, to_uint8
from tests.commands.words import replaced
from tests.evaluation.networks import TinyExtractor, random_images
from tests.pipelines.helpers import tiny_pipeline


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "evaluate_generation.py"
EXTRACTOR = "tests.evaluation.networks:TinyExtractor"
COUNT = 21
ALL_METRICS = ("fid", "sfid", "inception_score", "precision_recall", "kid", "kid_subsets")


@pytest.fixture
def generated():
    return random_images(COUNT, size=16)


@pytest.fixture
def real():
    return random_images(17, seed=5, size=24)


@pytest.fixture
def words(tmp_path, generated, real, write_images):
    """A command line that scores a folder of images against another."""
    samples, reference = write_images(tmp_path / "samples", generated), write_images(tmp_path / "real", real)
    return [
        *("--samples", str(samples), "--reference", str(reference), "--extractor", EXTRACTOR, "--batch_size", "4"),
        *("--device", "cpu", "--output_dir", str(tmp_path / "out")),
    ]


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("sde").save_pretrained(folder)
    return folder


def evaluate(words):
    PartialState._reset_state()
    evaluate_generation.main(words)
    folder = Path(words[words.index("--output_dir") + 1])
    return json.loads((folder / "generation.json").read_text())


def moments(rows):
    return Moments(rows.double().mean(dim=0), torch.from_numpy(np.cov(rows.double().numpy().T)), len(rows))


def from_pipeline(words, pipeline_folder, **values):
    given = {"pretrained_model_name_or_path": pipeline_folder, "num_images": COUNT, "num_inference_steps": 2}
    return replaced(words, samples=None, **given | {"guidance_scale": 1.5} | values)


def test_numbers_are_those_of_all_images_at_once(words, generated, real, capsys):
    report = evaluate(replaced(words, metrics=ALL_METRICS, kid_subset_size=5))
    extractor = TinyExtractor()
    first, second = extractor(generated), extractor(real)
    precision, recall = precision_recall(first["pool"], second["pool"])
    score, deviation = inception_score(first["logits"])
    subsets, subsets_deviation = kernel_distance_of_subsets(first["pool"], second["pool"], subset_size=5)
    expected = {
        "fd": frechet_distance(moments(first["pool"]), moments(second["pool"])),
        "sfd": frechet_distance(moments(first["spatial"]), moments(second["spatial"])),
        "inception_score": score,
        "inception_score_std": deviation,
        "precision": precision,
        "recall": recall,
        "kid": kernel_distance(first["pool"], second["pool"]),
        "kid_subsets": subsets,
        "kid_subsets_std": subsets_deviation,
    }
    assert report["results"] == pytest.approx(expected, rel=1e-6)
    assert list(report["results"]) == list(expected)
    printed = capsys.readouterr().out
    assert f"| FD | {expected['fd']:.4f} |" in printed
    for text in ("extractor tiny;", "num images 21;", "num reference images 17;", "guidance not stated"):
        assert text in printed
    assert "/" not in report["protocol"]["images"] + report["protocol"]["reference"]
    assert (
        report["protocol"]["size"] == "16 x 16" and report["protocol"]["reference"] == "folder real of 24 x 24 pixels"
    )


def test_images_of_a_pipeline_are_those_of_generate(words, pipeline_folder, real):
    report = evaluate(from_pipeline(words, pipeline_folder))
    pipe, sampling = tiny_pipeline("sde"), {"num_inference_steps": 2, "guidance_method": "cfg", "guidance_scale": 1.5}
    labels = draw_labels(COUNT, list(range(pipe.transformer.config.num_classes)), "balanced", 0).tolist()
    parts = [range(start, min(start + 4, COUNT)) for start in range(0, COUNT, 4)]
    images = torch.cat(
        [
            to_uint8(
                generate_images(
                    pipe, part, labels[part.start : part.stop], 0, guidance_interval=(0.0, 0.75), **sampling
                )
            )
            for part in parts
        ]
    ).permute(0, 3, 1, 2)
    extractor = TinyExtractor()
    sets = [moments(extractor(pixels.contiguous())["pool"]) for pixels in (images, real)]
    assert report["results"]["fd"] == pytest.approx(frechet_distance(*sets), rel=1e-6)
    assert report["protocol"]["guidance"] == "cfg 1.5 in [0.0, 0.75]"
    assert report["protocol"]["num_inference_steps"] == 2 and report["protocol"]["dtype"] == "float32"


def test_a_stopped_evaluation_continues_to_the_same_number(words, tmp_path, monkeypatch, pipeline_folder):
    words = from_pipeline(words, pipeline_folder)
    expected = evaluate(words)
    again, batches = replaced(words, output_dir=tmp_path / "again"), []
    call = TinyExtractor.forward

    class Fault(Exception):
        pass

    def counting(extractor, images):
        if len(images) > 1:  # not the trial of the layers
            batches.append(len(images))
            if len(batches) == 4:
                raise Fault
        return call(extractor, images)

    monkeypatch.setattr(TinyExtractor, "forward", counting)
    monkeypatch.setattr("maetok_hf.evaluation.feature_run.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("maetok_hf.evaluation.feature_run.SAVES_APART", 0.0)
    with pytest.raises(Fault):
        evaluate(again)
    report = evaluate(again)
    assert report["protocol"] == expected["protocol"]
    assert report["results"] == pytest.approx(expected["results"], rel=1e-9)
    before = len(batches)
    assert evaluate(replaced(again, metrics=("kid",)))["results"].keys() == {"kid"}
    assert batches[before:] == [], "all features are there"


def test_references_of_all_kinds_give_the_same_number(words, tmp_path, real):
    expected = evaluate(replaced(words, metrics=("fid", "precision_recall")))["results"]
    pixels = real.permute(0, 2, 3, 1).numpy()
    extractor = TinyExtractor()
    np.savez(tmp_path / "images.npz", pixels)
    assert evaluate_with(words, tmp_path, "a", reference=tmp_path / "images.npz") == pytest.approx(expected, rel=1e-9)
    # the features of an evaluation whose samples these were
    of_real = replaced(words, samples=tmp_path / "real", output_dir=tmp_path / "real-scores")
    assert evaluate(of_real)["results"]["fd"] == pytest.approx(0, abs=1e-9)
    features = tmp_path / "real-scores" / "features" / "features.npz"
    assert evaluate_with(words, tmp_path, "b", reference=features) == pytest.approx(expected, rel=1e-9)
    # its statistics alone
    statistics = tmp_path / "real-scores" / "statistics.npz"
    found = evaluate_with(words, tmp_path, "c", reference=statistics, metrics=("fid", "sfid"))
    assert found["fd"] == pytest.approx(expected["fd"], rel=1e-9)
    with pytest.raises(SystemExit, match="lacks features of 'pool': leave out the `metrics`"):
        evaluate_with(words, tmp_path, "d", reference=statistics)
    # a file that does not say of which network it is
    found = extractor(real)["pool"]
    np.savez(tmp_path / "adm.npz", mu=found.mean(dim=0).numpy(), sigma=np.cov(found.double().numpy().T))
    with pytest.raises(SystemExit, match="taken for Inception's, and the extractor is 'tiny'"):
        evaluate_with(words, tmp_path, "e", reference=tmp_path / "adm.npz", metrics=("fid",))


def evaluate_with(words, tmp_path, name, metrics=("fid", "precision_recall"), **values):
    return evaluate(replaced(words, metrics=metrics, output_dir=tmp_path / name, **values))["results"]


def test_reference_features_are_shared_between_evaluations(words, tmp_path, monkeypatch, real):
    seen = []
    call = TinyExtractor.forward

    def counting(extractor, images):
        seen.append(tuple(images.shape))
        return call(extractor, images)

    monkeypatch.setattr(TinyExtractor, "forward", counting)
    cache = tmp_path / "cache"
    first = evaluate(replaced(words, reference_cache_dir=cache))
    second = evaluate(replaced(words, reference_cache_dir=cache, output_dir=tmp_path / "again"))
    assert first["results"] == pytest.approx(second["results"], rel=1e-12)
    assert sum(shape[0] for shape in seen if shape[2] == 24) == len(real)


def test_a_data_set_as_reference_is_cropped(words, tmp_path, real, write_images):
    folder = tmp_path / "data" / "train" / "cat"
    write_images(folder, real)
    given = {"reference": tmp_path / "data", "reference_resolution": 24, "cache_dir": tmp_path / "counts"}
    expected = evaluate(words)["results"]
    report = evaluate(replaced(words, output_dir=tmp_path / "again", **given))
    assert report["results"] == pytest.approx(expected, rel=1e-9)
    assert report["protocol"]["reference"].endswith(f" of 24 x 24 pixels, {CENTER_CROP}")
    fewer = evaluate(replaced(words, output_dir=tmp_path / "fewer", reference_num_images=9, **given))
    assert fewer["protocol"]["num_reference_images"] == 9


def test_samples_from_a_data_set_are_cropped(words, tmp_path, generated, write_images):
    write_images(tmp_path / "data" / "train" / "cat", generated)
    expected = evaluate(words)
    given = {"samples": tmp_path / "data", "samples_resolution": 16, "cache_dir": tmp_path / "counts"}
    report = evaluate(replaced(words, output_dir=tmp_path / "again", **given))
    assert report["results"] == pytest.approx(expected["results"], rel=1e-9)


def test_unfinished_set_of_generate_is_refused_and_a_whole_one_brings_its_protocol(words, tmp_path, pipeline_folder):
    settings = evaluate_generation.PipelineImages(
        tiny_pipeline("sde"),
        evaluate_generation.parse_options(from_pipeline(words, pipeline_folder)).generation(),
    ).settings
    (tmp_path / "set").mkdir()
    (tmp_path / "samples").rename(tmp_path / "set" / "images")
    (tmp_path / "set" / "settings.json").write_text(json.dumps({"settings": settings}))
    for samples in (tmp_path / "set", tmp_path / "set" / "images"):
        report = evaluate(replaced(words, samples=samples, output_dir=tmp_path / f"out-{samples.name}"))
        assert report["protocol"]["guidance"] == "cfg 1.5 in [0.0, 0.75]"
    (tmp_path / "set" / "images" / "000020.png").unlink()
    with pytest.raises(SystemExit, match="has 20 images, but its settings.json says 21: finish the set"):
        evaluate(replaced(words, samples=tmp_path / "set"))


def test_a_metric_that_the_extractor_cannot_give_is_refused_before_any_work(words, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyExtractor, "forward", lambda extractor, images: {"pool": images.float().mean(dim=(2, 3))})
    with pytest.raises(SystemExit, match="`metrics` sfid, inception_score need the layers logits, spatial, but the"):
        evaluate(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "features,found", [(torch.zeros(1, 4), "a Tensor"), ({"pool": torch.zeros(1)}, "those of {'pool': (1,)} for one")]
)
def test_an_extractor_of_another_form_is_refused_before_any_work(words, tmp_path, monkeypatch, features, found):
    monkeypatch.setattr(TinyExtractor, "forward", lambda extractor, images: features)
    with pytest.raises(
        SystemExit, match=re.escape(f"must give a dict of features of shape (n, dim) for n images, got {found}")
    ):
        evaluate(words)
    assert not (tmp_path / "out").exists()


def test_inception_score_needs_no_reference(words):
    report = evaluate(replaced(words, reference=None, metrics=("inception_score",)))
    assert report["protocol"]["reference"] == "none"
    assert report["results"]["inception_score"] >= 1


@pytest.mark.parametrize(
    "given,message",
    [
        ({"samples": None}, "Give either `samples`"),
        ({"num_inference_steps": 3}, "`num_inference_steps` = 3 has no effect with `samples`"),
        ({"metrics": ("inception_score",)}, "has no effect on 'inception_score', which compares with nothing"),
        ({"reference": None}, "`reference` is needed for all `metrics` but 'inception_score'"),
        ({"reference_split": "val"}, "`reference_split` = 'val' has no effect without `reference_resolution`"),
        ({"samples_split": "val"}, "`samples_split` = 'val' has no effect without `samples` and `samples_resolution`"),
        ({"cache_dir": "x"}, "`cache_dir` has no effect without a data set"),
        ({"kid_subset_size": 10}, "`kid_subset_size` has no effect without 'kid_subsets'"),
    ],
)
def test_wrong_options_end_with_a_message(words, capsys, given, message):
    with pytest.raises(SystemExit):
        evaluate(replaced(words, **given))
    assert message in capsys.readouterr().err


def test_example_is_the_command(words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    PartialState._reset_state()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "out" / "generation.json").is_file()


@pytest.mark.slow
def test_two_processes_give_the_same_number(words, tmp_path, pipeline_folder):
    words = from_pipeline(words, pipeline_folder)
    expected = evaluate(words)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0", "--dynamo_backend", "no"]
    command = [*launch, str(EXAMPLE), *replaced(words, output_dir=tmp_path / "two")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    found = json.loads((tmp_path / "two" / "generation.json").read_text())
    assert found["protocol"] == expected["protocol"]
    assert found["results"] == pytest.approx(expected["results"], rel=1e-9)
