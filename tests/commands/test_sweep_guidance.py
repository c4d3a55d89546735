"""The sweep: every cell is what an evaluation of it alone gives, and is measured once."""

import json
import runpy
import sys
from pathlib import Path

import PIL.Image
import pytest
from accelerate.state import PartialState

from maetok_hf.commands import evaluate_generation, sweep_guidance
from maetok_hf.evaluation.pipeline_images import PipelineImages
from maetok_hf.sampling import protocol
from tests.evaluation.networks import random_images
from tests.pipelines.helpers import tiny_pipeline


EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep_guidance.py"
COUNT = 10


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("sde").save_pretrained(folder)
    return folder


@pytest.fixture
def common(tmp_path, pipeline_folder, write_images):
    folder = write_images(tmp_path / "real", random_images(8, seed=5, size=24))
    return [
        *("--pretrained_model_name_or_path", str(pipeline_folder), "--num_images", str(COUNT), "--batch_size", "4"),
        *("--num_inference_steps", "2", "--reference", str(folder), "--device", "cpu"),
        *("--extractor", "tests.evaluation.networks:TinyExtractor", "--metrics", "fid", "inception_score"),
    ]


def sweep(common, folder, scales=("1", "1.5", "3"), intervals=("0,1", "0,0.5"), methods=()):
    PartialState._reset_state()
    words = [*common, "--guidance_scales", *scales, "--guidance_intervals", *intervals, "--output_dir", str(folder)]
    sweep_guidance.main([*words, *(["--guidance_methods", *methods] if methods else [])])
    return json.loads((folder / "guidance.json").read_text())


@pytest.fixture
def made(monkeypatch):
    """Rows of every batch of images that was made."""
    rows, read = [], PipelineImages.read

    def recording(images, batch):
        rows.append(list(batch))
        return read(images, batch)

    monkeypatch.setattr(PipelineImages, "read", recording)
    return rows


def test_cells_are_scales_times_intervals_and_one_without_guidance(common, tmp_path, made, capsys):
    report = sweep(common, tmp_path / "out")
    asked = [(cell["scale"], cell["interval"]) for cell in report["cells"]]
    assert asked == [(1, None), (1.5, [0, 1]), (1.5, [0, 0.5]), (3, [0, 1]), (3, [0, 0.5])]
    assert sum(map(len, made)) == 5 * COUNT
    assert len({cell["results"]["fd"] for cell in report["cells"]}) == 5
    printed = capsys.readouterr().out
    assert printed.count("| cfg ") == 4 and "| none | 1 |" in printed
    assert "guidance as in the table" in printed and "num images 10;" in printed
    assert PIL.Image.open(tmp_path / "out" / "guidance.png").size[0] > 500
    assert (tmp_path / "out" / "guidance.md").read_text().strip() in printed
    assert not list((tmp_path / "out" / "cells").rglob("features.npz")), "features of cells are not kept"


def test_a_cell_is_what_its_evaluation_alone_gives(common, tmp_path):
    report = sweep(common, tmp_path / "out", scales=("1.5",), intervals=("0,0.5",))
    PartialState._reset_state()
    words = [*common, "--guidance_scale", "1.5", "--guidance_interval", "0", "0.5", "--guidance_method", "cfg"]
    evaluate_generation.main([*words, "--output_dir", str(tmp_path / "alone")])
    alone = json.loads((tmp_path / "alone" / "generation.json").read_text())
    [cell] = report["cells"]
    assert cell["results"] == pytest.approx(alone["results"], rel=1e-12)
    assert cell["protocol"] == alone["protocol"]


def test_a_stopped_sweep_continues_and_more_cells_are_added(common, tmp_path, made, monkeypatch):
    expected = sweep(common, tmp_path / "whole")
    made.clear()
    read = PipelineImages.read

    class Fault(Exception):
        pass

    def failing(images, rows):
        if len(made) == 7:
            raise Fault
        return read(images, rows)

    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(PipelineImages, "read", failing)
        sweep(common, tmp_path / "again")
    made.clear()
    assert sweep(common, tmp_path / "again")["cells"] == expected["cells"]
    assert sum(map(len, made)) == 3 * COUNT, "two of five cells were measured"
    made.clear()
    more = sweep(common, tmp_path / "again", scales=("1", "1.5", "2", "3"))
    assert sum(map(len, made)) == 2 * COUNT
    assert [cell for cell in more["cells"] if cell["scale"] != 2] == expected["cells"]


def test_weights_are_read_once_for_all_cells(common, tmp_path, monkeypatch):
    read = []
    digest = protocol.model_digest
    monkeypatch.setattr(protocol, "model_digest", lambda model: read.append(type(model).__name__) or digest(model))
    sweep(common, tmp_path / "out")
    assert sorted(read) == ["AutoencoderMAE", "SiTTransformer1DModel"]


def test_other_settings_are_other_cells(common, tmp_path, made):
    sweep(common, tmp_path / "out", scales=("1",))
    made.clear()
    sweep([*common, "--seed", "1"], tmp_path / "out", scales=("1",))
    sweep(common, tmp_path / "out", scales=("1",))
    assert sum(map(len, made)) == COUNT


def test_a_method_that_the_pipeline_cannot_do_is_refused_before_any_image(common, tmp_path, made):
    with pytest.raises(SystemExit, match="guidance_transformer"):
        sweep(common, tmp_path / "out", methods=("cfg", "autoguidance"))
    assert made == []


@pytest.mark.parametrize(
    "given,message",
    [
        ({"intervals": ("0.5,0.2",)}, "`guidance_intervals` must be like 0,0.75"),
        ({"scales": ("2", "2")}, "`guidance_scales` must name at least one value, and none twice"),
    ],
)
def test_wrong_options_end_with_a_message(common, tmp_path, capsys, given, message):
    with pytest.raises(SystemExit):
        sweep(common, tmp_path / "out", **given)
    assert message in capsys.readouterr().err


def test_example_is_the_command(common, monkeypatch, tmp_path):
    words = [*common, "--guidance_scales", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
    PartialState._reset_state()
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert (tmp_path / "out" / "guidance.json").is_file()
