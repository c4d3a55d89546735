"""`maetok-eval --push_to_hub`: numbers in the card of the model, each with its protocol and a link to its report."""

import json
import logging
import re

import pytest
from accelerate.state import PartialState
from huggingface_hub import HfApi, ModelCard, hf_hub_download

from maetok_hf.commands import evaluate, evaluate_generation, evaluate_tokenizer
from maetok_hf.training import hub as hub_module
from tests.commands.words import replaced
from tests.evaluation.networks import random_images
from tests.loopback_hub import QUOTA_MESSAGE, READ_TOKEN, check_card
from tests.pipelines.helpers import tiny_pipeline


COUNT = 6
COMMON = ("--extractor", "tests.evaluation.networks:TinyExtractor", "--batch_size", "4", "--device", "cpu")


@pytest.fixture
def pipe(hub, monkeypatch):
    """A pipeline that is in a repository."""
    monkeypatch.setattr(hub_module, "RETRY_WAITS", (0.0,))
    pipe = tiny_pipeline("sde", vae={"sample_size": 16})
    pipe.push_to_hub("user/pipe")
    return pipe


@pytest.fixture
def images(tmp_path, write_images):
    return str(write_images(tmp_path / "private folder" / "real", random_images(8, seed=5, size=16)))


@pytest.fixture
def generation(pipe, images, tmp_path):
    """A command line that scores the pipeline on the Hub."""
    return [
        *("generation", "--pretrained_model_name_or_path", "user/pipe", "--reference", images, *COMMON),
        *("--num_images", str(COUNT), "--num_inference_steps", "2", "--metrics", "fid", "inception_score"),
        *("--output_dir", str(tmp_path / "out"), "--push_to_hub", "user/pipe"),
    ]


def run(words):
    PartialState._reset_state()
    evaluate.main(words)


def results():
    """What the card says, after all checks."""
    return check_card("user/pipe").data.eval_results


def test_numbers_of_generated_images_are_in_the_card_with_their_protocol(hub, generation, tmp_path, capsys):
    text = ModelCard.load("user/pipe").text
    run(generation)
    report = json.loads((tmp_path / "out" / "generation.json").read_text())
    found = results()
    assert {one.metric_type: one.metric_value for one in found} == {
        name: value for name, value in report["results"].items() if name != "inception_score_std"
    }
    for one in found:
        assert (one.task_type, one.dataset_type) == ("unconditional-image-generation", "local")
        assert one.metric_args.items() <= report["protocol"].items()
        assert one.metric_args["num_images"] == COUNT and one.metric_args["num_inference_steps"] == 2
    # the link leads to the report
    (url,) = {one.source_url for one in found}
    place = re.fullmatch(f"{hub.endpoint}/user/pipe/blob/main/(evaluation/generation-[0-9a-f]{{12}}.json)", url)
    with open(hf_hub_download("user/pipe", place[1])) as file:
        assert json.load(file) == report
    assert f"The results are on the Hub: {url}" in capsys.readouterr().out
    # nothing else has changed, and nothing says where this machine keeps its files
    assert ModelCard.load("user/pipe").text == text
    pushed = [data for path, data in hub.repositories["user/pipe"].files.items() if path.endswith((".json", ".md"))]
    assert not any(str(tmp_path).encode() in data or b"private folder" in data for data in pushed)


def test_the_same_protocol_replaces_and_another_one_is_added(hub, generation, tmp_path, monkeypatch):
    run(generation)
    commits = len(hub.repositories["user/pipe"].messages)
    run(generation)
    assert len(results()) == 2 and len(hub.repositories["user/pipe"].messages) == commits
    compute = evaluate_generation.compute_scores
    monkeypatch.setattr(evaluate_generation, "compute_scores", lambda *a, **k: compute(*a, **k) | {"fd": 1.25})
    run(generation)
    assert {one.metric_type: one.metric_value for one in results()}["fd"] == 1.25 and len(results()) == 2
    run(replaced(generation, num_inference_steps=3, output_dir=tmp_path / "other"))
    steps = sorted((one.metric_type, one.metric_args["num_inference_steps"]) for one in results())
    assert steps == [("fd", 2), ("fd", 3), ("inception_score", 2), ("inception_score", 3)]


def test_third_parties_make_no_noise(pipe, images, tmp_path, recwarn):
    words = ["tokenizer", "--tokenizer_name_or_path", "user/pipe", "--tokenizer_subfolder", "vae", "--images", images]
    run([*words, *COMMON, "--output_dir", str(tmp_path / "tokenizer")])
    assert [str(one.message) for one in recwarn if "local_dir_use_symlinks" in str(one.message)] == []
    assert not logging.getLogger("huggingface_hub").propagate  # each of its messages once


def test_numbers_of_reconstructions_stand_beside_them(hub, pipe, images, generation, tmp_path):
    run(generation)
    words = ["tokenizer", "--tokenizer_name_or_path", "user/pipe", "--tokenizer_subfolder", "vae", "--images", images]
    run([*words, *COMMON, "--output_dir", str(tmp_path / "tokenizer"), "--push_to_hub", "pipe"])
    report = json.loads((tmp_path / "tokenizer" / "reconstruction.json").read_text())
    own = {one.metric_name: one for one in results() if one.task_type == "image-feature-extraction"}
    assert {name: one.metric_value for name, one in own.items()} == {
        evaluate_tokenizer.LABELS[name]: value for name, value in report["results"].items()
    }
    assert own["PSNR (dB)"].metric_args["tokenizer"] == "AutoencoderMAE user/pipe"
    assert len(results()) == 2 + len(own)


def test_a_sweep_is_uploaded_and_stays_out_of_the_card(hub, generation, tmp_path):
    words = replaced(
        ["guidance", *generation[1:]], guidance_scales=(1, 2), guidance_intervals=("0,1",), metrics=("fid",)
    )
    run(words)
    files = hub.repositories["user/pipe"].files
    names = sorted(path for path in files if path.startswith("evaluation/"))
    assert [re.sub("-[0-9a-f]{12}", "", name) for name in names] == [
        f"evaluation/guidance.{ending}" for ending in ("json", "md", "png")
    ]
    (picture,) = (data for path, data in files.items() if path.endswith(".png"))
    assert picture == (tmp_path / "out" / "guidance.png").read_bytes()
    assert ModelCard.load("user/pipe").data.eval_results is None


@pytest.mark.parametrize(
    "token, repo_id, reason",
    [(None, "user/missing", "404"), (READ_TOKEN, "user/pipe", "403"), ("", "pipe", "Token is required")],
)
def test_what_the_hub_refuses_is_an_error_before_any_work(
    hub, generation, monkeypatch, tmp_path, token, repo_id, reason
):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit, match=f"`push_to_hub` = '{repo_id}': .*{reason}"):
        run(replaced(generation, push_to_hub=repo_id))
    assert not (tmp_path / "out").exists() and "user/missing" not in hub.repositories


def test_a_failure_that_passes_is_tried_again(hub, generation):
    hub.fail("/commit/", 503, times=1)
    run(generation)
    hub.faults.clear()
    assert len(results()) == 2


def test_a_card_that_changes_meanwhile_keeps_both_changes(hub, generation, monkeypatch):
    load, licence = ModelCard.load, []

    def load_and_change(*args, **kwargs):
        card = load(*args, **kwargs)
        if not licence:  # somebody else is faster
            licence.append("mit")
            other = load("user/pipe")
            other.data.license = "mit"
            HfApi().upload_file(path_or_fileobj=str(other).encode(), path_in_repo="README.md", repo_id="user/pipe")
        return card

    monkeypatch.setattr(ModelCard, "load", load_and_change)
    run(generation)
    assert ModelCard.load("user/pipe").data.license == "mit" and len(results()) == 2


def test_a_failure_that_stays_leaves_the_results_here(hub, generation, tmp_path, capsys):
    hub.fail("/commit/", 403, message=QUOTA_MESSAGE)
    with pytest.raises(
        SystemExit, match=f"not all on the Hub in user/pipe: .*{QUOTA_MESSAGE}(.|\n)*same command again"
    ):
        run(generation)
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "out" / "generation.json").read_text())
    assert f"| FD | {report['results']['fd']:.4f} |" in printed
    hub.faults.clear()
    run(generation)
    assert len(results()) == 2
