"""The command and the example: the same numbers however often it was stopped, and never against other images."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import PartialState

from maetok_hf.commands import evaluate_tokenizer
from maetok_hf.evaluation import Moments, frechet_distance, save_moments
from maetok_hf.evaluation.extractors import INCEPTION_FILE
from maetok_hf.evaluation.reconstruction import TokenizerFeatures, reconstruct
from tests.commands.words import replaced
from tests.evaluation.networks import TinyExtractor, random_images
from tests.testing_utils import tiny_autoencoder


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "evaluate_tokenizer.py"
EXTRACTOR = "tests.evaluation.networks:TinyExtractor"
COUNT = 21


@pytest.fixture
def tokenizer(tmp_path):
    model = tiny_autoencoder(sample_size=16)
    model.save_pretrained(tmp_path / "tokenizer")
    return model


@pytest.fixture
def words(tmp_path, tokenizer, write_images):
    """A command line that evaluates a tokenizer on a folder of images."""
    write_images(tmp_path / "images", random_images(COUNT, size=16))
    return [
        *("--tokenizer_name_or_path", str(tmp_path / "tokenizer"), "--extractor", EXTRACTOR, "--batch_size", "4"),
        *("--images", str(tmp_path / "images"), "--device", "cpu", "--output_dir", str(tmp_path / "out")),
    ]


def evaluate(words):
    PartialState._reset_state()
    evaluate_tokenizer.main(words)
    folder = Path(words[words.index("--output_dir") + 1])
    return json.loads((folder / "reconstruction.json").read_text())


def moments(rows):
    return Moments(rows.double().mean(dim=0), torch.from_numpy(np.cov(rows.double().numpy().T)), len(rows))


def test_numbers_are_those_of_all_images_at_once(words, tokenizer, capsys):
    report = evaluate(words)
    images, extractor = random_images(COUNT, size=16), TinyExtractor()
    reconstructions = reconstruct(tokenizer, images)
    sets = [moments(extractor(pixels)["pool"]) for pixels in (reconstructions, images)]
    psnr, ssim = TokenizerFeatures(tokenizer)(images)["scores"].mean(dim=0).tolist()
    expected = {"rfd": frechet_distance(*sets), "psnr": psnr, "ssim": ssim}
    assert report["results"] == pytest.approx(expected, rel=1e-6)
    printed = capsys.readouterr().out
    assert f"| PSNR (dB) | {psnr:.4f} |" in printed and "| rFD |" in printed
    for text in ("extractor tiny", "num images 21", "size 16 x 16", "rounding nearest", "data range 1.0", "float32"):
        assert text in printed
    assert report["protocol"]["extractor_digest"] == extractor.digest
    assert "/" not in report["protocol"]["tokenizer"] + report["protocol"]["images"]


def test_a_stopped_evaluation_continues_to_the_same_number(words, tmp_path, monkeypatch):
    expected = evaluate(words)
    again, batches = replaced(words, output_dir=tmp_path / "again"), []
    call = TokenizerFeatures.__call__

    class Fault(Exception):
        pass

    def counting(features, images):
        batches.append(len(images))
        if len(batches) == 4:
            raise Fault
        return call(features, images)

    monkeypatch.setattr(TokenizerFeatures, "__call__", counting)
    monkeypatch.setattr("maetok_hf.evaluation.feature_run.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr("maetok_hf.evaluation.feature_run.SAVES_APART", 0.0)
    with pytest.raises(Fault):
        evaluate(again)
    continued = evaluate(again)
    # sums of float64 in another order
    assert continued["results"] == pytest.approx(expected["results"], rel=1e-12)
    assert continued["protocol"] == expected["protocol"]
    assert sum(batches[4:]) == COUNT - 12
    assert evaluate(again) == continued, "from what is on the disk"
    assert sum(batches[4:]) == COUNT - 12


def test_statistics_of_originals_serve_other_tokenizers(words, tmp_path):
    expected = evaluate(words)
    originals = tmp_path / "out" / "originals.npz"
    found = evaluate(replaced(words, output_dir=tmp_path / "again", reference=originals))
    assert found["results"] == pytest.approx(expected["results"], rel=1e-9)
    assert not (tmp_path / "again" / "originals.npz").exists()


def test_a_reference_of_other_images_is_refused(words, tmp_path):
    evaluate(words)
    again = replaced(words, output_dir=tmp_path / "again", reference=tmp_path / "out" / "originals.npz")
    with pytest.raises(SystemExit, match="of another protocol:\n  images"):
        evaluate(replaced(again, num_images=20))
    statistics = moments(TinyExtractor()(random_images(COUNT))["pool"])
    train = tmp_path / "VIRTUAL_train.npz"
    np.savez(train, mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    with pytest.raises(SystemExit, match="does not say of which images it is: rFID compares with the originals"):
        evaluate(replaced(again, reference=train))
    save_moments(train, {"pool": statistics}, {"extractor": "inception"})
    with pytest.raises(SystemExit, match="extractor: 'inception' there, 'tiny' now"):
        evaluate(replaced(again, reference=train))


def test_scores_alone_need_no_network(words, tmp_path):
    report = evaluate(replaced(words, extractor="none", authors_ssim="true"))
    assert report["results"].keys() == {"psnr", "ssim", "ssim_data_range_2"}
    assert report["protocol"]["extractor"] == "none"
    assert not (tmp_path / "out" / "originals.npz").exists()


def test_a_data_set_is_read_at_the_resolution_that_is_asked_for(words, tmp_path):
    folder = tmp_path / "data" / "validation" / "cat"
    folder.mkdir(parents=True)
    for number, pixels in enumerate(random_images(5, size=40)):
        PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()[:, :30]).save(folder / f"{number}.png")
    index = words.index("--images")
    words = words[:index] + words[index + 2 :]
    options = {"dataset_name": tmp_path / "data", "resolution": 16, "cache_dir": tmp_path / "cache", "num_images": 4}
    report = evaluate(replaced(words, **options))
    assert report["protocol"]["size"] == "16 x 16" and report["protocol"]["num_images"] == 4
    assert "cropped at the centre" in report["protocol"]["crop"]
    assert str(tmp_path) not in json.dumps(report)


@pytest.mark.parametrize("given,file", [({"extractor": "inception"}, INCEPTION_FILE), ({"lpips": "alex"}, "alexnet")])
def test_missing_weights_are_named_before_anything_is_computed(words, tmp_path, monkeypatch, given, file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def offline(*arguments, **keywords):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(SystemExit, match=f"{file}.*"):
        evaluate(replaced(words, **given))
    assert not (tmp_path / "out" / "features").exists()


def test_an_extractor_that_cannot_be_imported_is_named(words):
    with pytest.raises(SystemExit, match="`extractor` 'nowhere:Network' cannot be imported .*PYTHONPATH"):
        evaluate(replaced(words, extractor="nowhere:Network"))


def test_wrong_options_end_with_a_message(words, capsys):
    with pytest.raises(SystemExit):
        evaluate(replaced(words, split="train"))
    assert "`split` = 'train' has no effect with `images`" in capsys.readouterr().err


def test_example_is_the_command(words, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    PartialState._reset_state()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "out" / "reconstruction.json").is_file()


@pytest.mark.slow
def test_two_processes_give_the_same_number(words, tmp_path):
    expected = evaluate(words)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0", "--dynamo_backend", "no"]
    command = [*launch, str(EXAMPLE), *replaced(words, output_dir=tmp_path / "two")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "", "HOME": str(tmp_path)}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    found = json.loads((tmp_path / "two" / "reconstruction.json").read_text())
    assert found["protocol"] == expected["protocol"]
    assert found["results"] == pytest.approx(expected["results"], rel=1e-9)
