"""`maetok-convert` from a Hub to a Hub: what it reads and leaves there, and what it says when that fails."""

import json

import numpy as np
import pytest
import torch

from maetok_hf import MAETokDiffusionPipeline
from maetok_hf.commands import convert
from maetok_hf.training import hub as hub_module
from tests.loopback_hub import QUOTA_MESSAGE, check_card, without_waiting
from tests.testing_utils import GOLDEN


@pytest.fixture
def words(hub, tmp_path, monkeypatch):
    """A command line that converts a pipeline between repositories; latents of the golden files fit each other."""
    monkeypatch.setattr(hub_module, "RETRY_WAITS", (0.0,))
    without_waiting(monkeypatch)
    for name, repo_id in (("tokenizer_rope", "authors/tokenizer"), ("sit", "authors/sit")):
        files = {file: (GOLDEN / name / file).read_bytes() for file in ("config.json", "model.safetensors")}
        hub.add(repo_id, files)
    tokens = json.loads((GOLDEN / "sit" / "config.json").read_text())
    (tmp_path / "names.json").write_text(json.dumps({str(i): f"class {i}" for i in range(tokens["num_classes"])}))
    return [
        *("authors/tokenizer", "--transformer", "authors/sit", "--id2label", str(tmp_path / "names.json")),
        *(
            "--output",
            str(tmp_path / "converted"),
            "--push_to_hub",
            "user/converted",
            "--dtype",
            "float32",
            "bfloat16",
        ),
    ]


def run(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images


def test_a_pipeline_goes_from_a_hub_to_a_hub(hub, words, tmp_path):
    convert.main([*words, "--hub_private_repo", "true"])
    repository = hub.repositories["user/converted"]
    assert repository.private and len(repository.messages) == 1
    local = {str(p.relative_to(tmp_path / "converted")) for p in (tmp_path / "converted").rglob("*") if p.is_file()}
    assert repository.files.keys() == local
    here, there = (
        MAETokDiffusionPipeline.from_pretrained(place) for place in (tmp_path / "converted", "user/converted")
    )
    np.testing.assert_array_equal(run(here), run(there))
    half = MAETokDiffusionPipeline.from_pretrained("user/converted", variant="bf16", dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16 and half.id2label[1] == "class 1"
    card = check_card("user/converted")
    assert "user/converted" in card.text and str(tmp_path) not in str(card)
    # the commits that were read are named
    assert hub.repositories["authors/sit"].sha[:7] in card.text


def test_a_full_storage_leaves_the_folder_and_a_command(hub, words, tmp_path):
    hub.quota = 1000
    with pytest.raises(SystemExit) as end:
        convert.main(words)
    said = end.value.code
    assert QUOTA_MESSAGE in said and f"hf upload user/converted {tmp_path / 'converted'} ." in said
    run(MAETokDiffusionPipeline.from_pretrained(tmp_path / "converted"))
    assert hub.repositories["user/converted"].messages == []


@pytest.mark.parametrize("fault", ["private", "elsewhere", "cut"])
def test_what_cannot_be_read_or_written_is_known_before_there_is_output(hub, words, tmp_path, fault):
    if fault == "private":
        hub.add("somebody/hidden", hub.repositories["authors/sit"].files, private=True)
        words += ["--transformer", "somebody/hidden"]
        reason = "transformer somebody/hidden: 404 Client Error."
    elif fault == "elsewhere":
        words += ["--push_to_hub", "somebody/converted"]
        reason = "`push_to_hub` = 'somebody/converted'"
    else:
        hub.cut("GET /lfs/", after=1000)
        reason = "model.safetensors of the Hub repo authors/tokenizer could not be downloaded"
    with pytest.raises(SystemExit) as end:
        convert.main(words)
    assert reason in end.value.code
    assert not (tmp_path / "converted").exists()
