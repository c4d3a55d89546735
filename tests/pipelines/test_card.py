"""A pipeline on the Hub: pushed with a card, loaded by name, revision and variant, and what is said when it fails."""

import ast
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

from maetok_hf import MAETokDiffusionPipeline
from tests.loopback_hub import QUOTA_MESSAGE, check_card, connect_clients, without_waiting
from tests.pipelines.helpers import generator, tiny_pipeline


NAMES = {0: "tench, Tinca tinca", 9: 'a "quoted" goldfish'}


def run(pipe: DiffusionPipeline) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[0, 9], num_inference_steps=2, generator=generator(), output_type="np").images


@pytest.fixture
def pushed(hub, tmp_path):
    """A pipeline in a repository."""
    pipe = tiny_pipeline(id2label=NAMES)
    pipe.save_pretrained(tmp_path / "pipe")
    files = {str(p.relative_to(tmp_path / "pipe")): p.read_bytes() for p in (tmp_path / "pipe").rglob("*.*")}
    hub.add("user/pipe", files)
    return pipe


def test_a_pipeline_comes_back_by_its_name_with_a_card(hub):
    pipe = tiny_pipeline("sde", id2label=NAMES, guidance_transformer={})
    pipe.push_to_hub("user/pipe")
    for loader in (MAETokDiffusionPipeline, DiffusionPipeline):
        np.testing.assert_array_equal(run(loader.from_pretrained("user/pipe")), run(pipe))
    assert hub.repositories["user/pipe"].messages == ["Upload MAETokDiffusionPipeline"]
    card = check_card("user/pipe")
    assert card.data.to_dict() == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["maetok", "class-conditional-image-generation"],
    }
    code = card.text.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert 'pipe(class_labels="tench"' in code
    for row in (
        "| vae | AutoencoderMAE, 65380, float32 |",
        "| latents | 6 tokens of 4 channels |",
        "| scheduler | FlowMatchEulerMaruyamaScheduler |",
        '| classes | 10: tench, Tinca tinca; a "quoted" goldfish |',
        "| guidance_transformer | SiTTransformer1DModel, ",
        "| default_guidance_scale | ",
    ):
        assert f"\n{row}" in card.text


def test_a_pipeline_without_names_and_with_a_thousand(hub):
    tiny_pipeline().push_to_hub("user/nameless")
    tiny_pipeline(id2label=dict(enumerate("abcdefghijkl"[:10]))).push_to_hub("user/named")
    texts = {name: ModelCard.load(f"user/{name}").text for name in ("nameless", "named")}
    assert "| classes | 10 |" in texts["nameless"] and "class_labels=0," in texts["nameless"]
    assert "| classes | 10: a; b; c; d; e; f; g; h; i; j |" in texts["named"]


def test_revisions_and_variants(hub, pushed):
    api = HfApi()
    api.create_tag("user/pipe", tag="v1")
    other = tiny_pipeline(id2label=NAMES, transformer={"num_layers": 1})
    other.push_to_hub("user/pipe", commit_message="Smaller")
    pushed.to(torch.float16).push_to_hub("user/pipe", variant="fp16", commit_message="Half precision")
    pushed.to(torch.float32)
    api.create_branch("user/pipe", branch="half")
    first = MAETokDiffusionPipeline.from_pretrained("user/pipe", revision="v1")
    np.testing.assert_array_equal(run(first), run(tiny_pipeline(id2label=NAMES)))
    downloads = hub.count(r"GET /lfs/")
    half = MAETokDiffusionPipeline.from_pretrained("user/pipe", revision="half", variant="fp16", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16 and half.transformer.config.num_layers == 2
    assert hub.count("GET /lfs/") == downloads + 2  # the weights of the variant alone
    with pytest.raises(OSError, match="Revision Not Found.*Invalid rev id: no_such"):
        MAETokDiffusionPipeline.from_pretrained("user/pipe", revision="no_such")
    with pytest.raises((OSError, ValueError), match="bf16"):
        MAETokDiffusionPipeline.from_pretrained("user/pipe", variant="bf16")


@pytest.mark.parametrize("load", ["pipeline", "model"])
def test_a_private_repository_needs_a_token(hub, pushed, monkeypatch, tmp_path, load):
    hub.repositories["user/pipe"].private = True
    loaders = {
        "pipeline": lambda **token: MAETokDiffusionPipeline.from_pretrained("user/pipe", **token),
        "model": lambda **token: type(pushed.vae).from_pretrained("user/pipe", subfolder="vae", **token),
    }
    with monkeypatch.context() as patch:
        connect_clients(patch, hub, tmp_path / "stranger", token=None)
        with pytest.raises(OSError, match="private (or gated )?repo.*(pass a token|make sure you are authenticated)"):
            loaders[load]()
        loaders[load](token="hf_read")
    loaders[load]()


def test_a_gated_repository_names_its_terms(hub, pushed):
    hub.add("other/pipe", hub.repositories["user/pipe"].files, gated=True)
    with pytest.raises(GatedRepoError, match="Access to model other/pipe is restricted"):
        MAETokDiffusionPipeline.from_pretrained("other/pipe")
    hub.repositories["other/pipe"].accepted.add("hf_write")
    MAETokDiffusionPipeline.from_pretrained("other/pipe")


def test_failures_of_a_download_pass(hub, pushed, monkeypatch):
    without_waiting(monkeypatch)
    hub.fail("HEAD /user/pipe/resolve/.*safetensors", 503, times=2)
    hub.fail("GET /lfs/", 429, times=1, headers={"Retry-After": "1"})
    hub.cut("GET /lfs/", times=2, after=1000)
    np.testing.assert_array_equal(run(MAETokDiffusionPipeline.from_pretrained("user/pipe")), run(pushed))


@pytest.mark.parametrize("fault", ["cut", "unavailable"])
def test_a_failed_download_leaves_nothing_that_is_taken_for_whole(hub, pushed, monkeypatch, tmp_path, fault):
    without_waiting(monkeypatch)
    if fault == "cut":
        hub.cut("GET /lfs/", after=1000)
    else:
        hub.fail("GET /lfs/", 503)
    with pytest.raises(Exception, match="503 Service Unavailable" if fault == "unavailable" else "connection"):
        MAETokDiffusionPipeline.from_pretrained("user/pipe")
    assert not list((tmp_path / "home").rglob("snapshots/*/*/*.safetensors"))
    hub.faults.clear()
    np.testing.assert_array_equal(run(MAETokDiffusionPipeline.from_pretrained("user/pipe")), run(pushed))


def test_a_full_storage_is_named_and_nothing_is_committed(hub, tmp_path):
    pipe = tiny_pipeline()
    hub.quota = 1000
    with pytest.raises(HfHubHTTPError, match=re.escape(QUOTA_MESSAGE)):
        pipe.save_pretrained(str(tmp_path / "pipe"), push_to_hub=True, repo_id="user/pipe")
    assert hub.repositories["user/pipe"].messages == []
    np.testing.assert_array_equal(run(MAETokDiffusionPipeline.from_pretrained(tmp_path / "pipe")), run(pipe))


def test_what_a_repository_lacks_is_named(hub, pushed):
    index = json.loads(hub.repositories["user/pipe"].files["model_index.json"])
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    hub.repositories["user/pipe"].commit("no index", {"model_index.json": None})
    with pytest.raises(OSError, match="model_index.json"):
        MAETokDiffusionPipeline.from_pretrained("user/pipe")
    hub.repositories["user/pipe"].commit("index", {"model_index.json": json.dumps(index).encode()})
    assert isinstance(MAETokDiffusionPipeline.from_pretrained("user/pipe").scheduler, FlowMatchEulerDiscreteScheduler)
