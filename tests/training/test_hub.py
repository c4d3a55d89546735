"""Uploads reach the Hub in the background, and whatever happens to them, training goes on and nothing is lost."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import HfApi

from maetok_hf import AutoencoderMAE
from maetok_hf.training import hub as hub_module
from maetok_hf.training import hub_worker
from maetok_hf.training.hub import HubUpload
from tests.loopback_hub import READ_TOKEN, LoopbackHub
from tests.testing_utils import tiny_autoencoder


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_autoencoder().save_pretrained(folder)
    return folder


def upload_of(tmp_path, **settings) -> HubUpload:
    return HubUpload("tokenizer", tmp_path / "run", **({"retry_waits": ()} | settings))


def files_of(hub: LoopbackHub) -> dict[str, bytes]:
    files = hub.repositories["user/tokenizer"].files
    return {path: data for path, data in files.items() if path != ".gitattributes"}


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def equal_weights(first: AutoencoderMAE, second: AutoencoderMAE) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(one == other and torch.equal(tensor, same) for (one, tensor), (other, same) in pairs)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_loaded_from_the_hub_is_what_was_uploaded(hub, model_folder, tmp_path, caplog):
    card, picture = tmp_path / "README.md", tmp_path / "grid.png"
    card.write_text("---\nlicense: apache-2.0\n---\n# A tokenizer\n")
    picture.write_bytes(b"pixels")
    upload = upload_of(tmp_path, private=True)
    assert upload.repo_id == "user/tokenizer"
    with caplog.at_level(logging.INFO):
        upload.start({".": model_folder, "README.md": card, "pictures/grid.png": picture}, "Step 5")
        assert upload.finish()
    assert "Step 5 is on the Hub: user/tokenizer" in caplog.messages
    repository = hub.repositories["user/tokenizer"]
    assert repository.private and repository.messages == ["Step 5"]
    expected = contents(model_folder) | {"README.md": card.read_bytes(), "pictures/grid.png": b"pixels"}
    assert files_of(hub) == expected
    HfApi(endpoint=hub.endpoint).snapshot_download("user/tokenizer", local_dir=tmp_path / "download")
    assert equal_weights(AutoencoderMAE.from_pretrained(tmp_path / "download"), tiny_autoencoder())
    assert not (tmp_path / "run" / "hub_upload").exists()


@pytest.mark.slow
def test_an_uploaded_model_loads_by_its_name_in_a_fresh_process(hub, model_folder, tmp_path):
    upload = upload_of(tmp_path)
    upload.start({".": model_folder}, "Step 5")
    assert upload.finish()
    code = (
        "import sys; from maetok_hf import AutoencoderMAE; "
        "AutoencoderMAE.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, "user/tokenizer", str(tmp_path / "loaded")], check=True, timeout=300)
    assert equal_weights(AutoencoderMAE.from_pretrained(tmp_path / "loaded"), tiny_autoencoder())


def test_training_may_replace_and_remove_the_files_at_once(hub, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    replaced, removed = tmp_path / "config.json", tmp_path / "checkpoint" / "model.safetensors"
    replaced.write_text("old")
    removed.write_text("weights")
    upload = upload_of(tmp_path)
    with hub.lock:
        upload.start({"config.json": replaced, ".": removed.parent}, "Step 1")
        (tmp_path / "new").write_text("new")
        os.replace(tmp_path / "new", replaced)
        removed.unlink()
    assert upload.finish()
    assert files_of(hub) == {"config.json": b"old", "model.safetensors": b"weights"}


def test_a_newer_request_replaces_one_that_waits(hub, tmp_path):
    file = tmp_path / "config.json"
    upload = upload_of(tmp_path)
    with hub.lock:
        for number in (1, 2, 3):
            (tmp_path / "next").write_text(str(number))
            os.replace(tmp_path / "next", file)
            upload.start({"config.json": file}, f"Step {number}")
            if number == 1:
                wait_until(lambda: upload._waiting is None)
    assert upload.finish()
    assert hub.repositories["user/tokenizer"].messages == ["Step 1", "Step 3"]
    assert files_of(hub) == {"config.json": b"3"}


@pytest.mark.parametrize("status", [503, 429, 412, None], ids=["unavailable", "too_many", "other_commit", "cut"])
def test_a_failure_that_passes_is_tried_again(hub, model_folder, tmp_path, status, caplog):
    upload = upload_of(tmp_path, retry_waits=(0.01, 0.01))
    if status is None:
        hub.cut("POST /api/models/.*/commit/", times=2, after=100)
    else:
        hub.fail("POST /api/models/.*/commit/", status, times=2)
    upload.start({".": model_folder}, "Step 1")
    assert upload.finish()
    assert files_of(hub) == contents(model_folder)
    assert hub.count("/commit/") == 3
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    "request_, status, attempts, retry_waits",
    [
        ("POST /api/models/.*/commit/", 403, 1, (0.01, 0.01)),
        ("PUT /lfs/", 413, 1, (0.01, 0.01)),
        ("POST /api/models/.*/commit/", 500, 3, (0.01, 0.01)),
    ],
    ids=["quota", "too_large", "broken"],
)
def test_a_failure_that_stays_is_a_warning_and_the_files_are_kept(
    hub, model_folder, tmp_path, request_, status, attempts, retry_waits, caplog
):
    before = contents(model_folder)
    upload = upload_of(tmp_path, retry_waits=retry_waits)
    hub.fail(request_, status, message="You have exceeded your storage limit")
    upload.start({".": model_folder}, "Step 1")
    assert not upload.finish()
    assert hub.count(request_) == attempts
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert message.startswith("Step 1 is not uploaded, training goes on: ")
    assert "You have exceeded your storage limit" in message
    snapshot = tmp_path / "run" / "hub_upload" / "1"
    assert message.endswith(f"To upload it by hand: hf upload user/tokenizer {snapshot}")
    assert contents(snapshot) == contents(model_folder) == before


def test_after_a_failed_upload_the_next_one_is_made_and_clears_up(hub, model_folder, tmp_path):
    upload = upload_of(tmp_path)
    hub.fail("/commit/", 403, times=1)
    upload.start({".": model_folder}, "Step 1")
    wait_until(lambda: hub.count("/commit/") == 1)
    upload.start({".": model_folder}, "Step 2")
    assert upload.finish()
    assert hub.repositories["user/tokenizer"].messages == ["Step 2"]
    assert not (tmp_path / "run" / "hub_upload").exists()


@pytest.mark.parametrize(
    "token, repo_id, reason",
    [
        ("hf_wrong", "tokenizer", "401"),
        ("", "tokenizer", "401"),
        (READ_TOKEN, "tokenizer", "403"),
        (READ_TOKEN, "user/existing", "403"),
        (None, "somebody/tokenizer", "403"),
        (None, "a name with spaces", "HFValidationError"),
    ],
)
def test_what_the_hub_refuses_at_the_start_is_an_error(hub, monkeypatch, tmp_path, token, repo_id, reason):
    HfApi(endpoint=hub.endpoint).create_repo("user/existing")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=f"`hub_model_id` = '{repo_id}': .*{reason}(.|\n)*`hf auth login`"):
        HubUpload(repo_id, tmp_path / "run")
    assert not (tmp_path / "run" / "hub_upload").exists()


def test_offline_mode_is_refused_at_the_start(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        upload_of(tmp_path)


def test_a_hub_that_cannot_be_reached_at_the_start_is_tried_again(hub, model_folder, tmp_path, caplog):
    hub.fail("/api/repos/create", 503, times=1)
    upload = upload_of(tmp_path)
    assert "The Hub cannot be reached, uploads to tokenizer are tried nevertheless: " in caplog.text
    upload.start({".": model_folder}, "Step 1")
    assert upload.finish()
    assert upload.repo_id == "user/tokenizer"
    assert files_of(hub) == contents(model_folder)


def test_without_a_network_training_begins_and_ends(hub, monkeypatch, model_folder, tmp_path, caplog):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    upload = upload_of(tmp_path)
    upload.start({".": model_folder}, "Step 1")
    assert not upload.finish()
    assert "Connection refused" in caplog.messages[-1]


def test_an_upload_that_hangs_is_given_up_at_the_end(hub, model_folder, tmp_path, caplog):
    upload = upload_of(tmp_path)
    with hub.lock:
        upload.start({".": model_folder}, "Step 1")
        wait_until(lambda: upload._waiting is None)
        upload.start({".": model_folder}, "Step 2")
        started = time.monotonic()
        assert not upload.finish(timeout=0.2)
        assert time.monotonic() - started < 30
    assert upload._process.returncode is not None
    assert [message.split("\n")[0] for message in caplog.messages] == [
        "Step 1 is not uploaded, training goes on: it took too long",
        "Step 2 is not uploaded, training goes on: it took too long",
    ]
    assert contents(tmp_path / "run" / "hub_upload" / "2") == contents(model_folder)


def test_a_run_that_never_waits_for_its_uploads_can_end(hub, model_folder, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from hub import HubUpload; "
        "HubUpload('tokenizer', sys.argv[2]).start({'.': sys.argv[3]}, 'Step 1'); print('trained')"
    )
    hub.fail("/commit/", 503)
    folder = os.path.dirname(hub_module.__file__)
    command = [sys.executable, "-P", "-c", code, folder, str(tmp_path / "run"), str(model_folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "trained\n"), result.stderr


def test_a_file_that_is_missing_is_a_warning(hub, tmp_path, caplog):
    upload = upload_of(tmp_path)
    upload.start({"config.json": tmp_path / "config.json"}, "Step 1")
    assert not upload.finish()
    assert "Step 1 is not uploaded to user/tokenizer, training goes on: " in caplog.text
    assert hub.repositories["user/tokenizer"].messages == []


def test_a_worker_that_crashes_is_a_warning_with_its_last_words(hub, model_folder, monkeypatch, tmp_path, caplog):
    upload = upload_of(tmp_path)
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('out of memory')")
    monkeypatch.setattr(hub_module, "WORKER", worker)
    upload.start({".": model_folder}, "Step 1")
    assert not upload.finish()
    assert "the upload ended with status 1. out of memory" in caplog.text


def test_files_are_copied_where_the_file_system_has_no_links(hub, model_folder, monkeypatch, tmp_path):
    def refuse(source, target):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    upload = upload_of(tmp_path)
    upload.start({".": model_folder}, "Step 1")
    assert upload.finish()
    assert files_of(hub) == contents(model_folder)


def test_a_worker_whose_run_has_ended_does_not_try_again(hub, model_folder):
    hub.fail("/commit/", 503)
    request = {"repo_id": "tokenizer", "private": False, "folder": str(model_folder), "message": "Step 1"}
    code = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); import hub_worker; "
        "print(hub_worker.run(json.loads(sys.argv[2]), [60.0], parent=os.getpid()))"  # it is not its own parent
    )
    folder = os.path.dirname(hub_worker.__file__)
    command = [sys.executable, "-P", "-c", code, folder, json.dumps(request)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert "'permanent': False" in result.stdout and hub.count("/commit/") == 1
