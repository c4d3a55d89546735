"""What a command has made reaches the Hub, or is still there with a command that brings it there."""

import re

import pytest
from huggingface_hub import HfApi, snapshot_download

from maetok_hf.training import hub as hub_module
from maetok_hf.training.hub_files import check_upload, upload_files
from tests.loopback_hub import QUOTA_MESSAGE, READ_TOKEN, without_waiting


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module, "RETRY_WAITS", (0.0, 0.0))
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "a.parquet").write_bytes(b"rows")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "out" / "run.lock").touch()
    return tmp_path / "out"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("repo_type, place", [("model", "user/thing"), ("dataset", "datasets/user/thing")])
def test_files_are_uploaded_by_one_commit(hub, folder, tmp_path, repo_type, place):
    assert check_upload("thing", repo_type=repo_type, private=True) == "user/thing"
    assert hub.repositories[place].private and hub.repositories[place].messages == []
    patterns = ["data/*", "README.md"]
    assert upload_files(folder, "thing", "All", repo_type=repo_type, allow_patterns=patterns) == "user/thing"
    assert hub.repositories[place].messages == ["All"]
    download = snapshot_download("user/thing", repo_type=repo_type, local_dir=tmp_path / "download")
    expected = {name: data for name, data in contents(folder).items() if name != "run.lock"}
    assert {name: data for name, data in contents(tmp_path / "download").items() if ".cache" not in name} == expected
    assert download


@pytest.mark.parametrize(
    "token, repo_id, reason",
    [
        ("", "thing", "401"),
        (READ_TOKEN, "user/existing", "403"),
        (None, "somebody/thing", "403"),
        (None, "a name with spaces", "HFValidationError"),
    ],
)
def test_what_the_hub_refuses_is_an_error_before_any_work(hub, monkeypatch, token, repo_id, reason):
    hub.add("datasets/user/existing")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=f"`push_to_hub` = '{repo_id}': .*{reason}(.|\n)*`hf auth login`"):
        check_upload(repo_id, repo_type="dataset")


def test_a_hub_that_is_away_is_no_reason_to_do_no_work(hub, caplog):
    hub.fail("/api/repos/create", 503)
    assert check_upload("thing") == "thing"
    assert "The Hub cannot be reached, the upload to thing is tried nevertheless: " in caplog.text


@pytest.mark.parametrize("fault", ["unavailable", "other_commit", "cut", "cut_body"])
def test_a_failure_that_passes_is_tried_again(hub, folder, monkeypatch, caplog, fault):
    without_waiting(monkeypatch)
    if fault == "cut":
        hub.cut("POST .*/commit/", times=2)
    elif fault == "cut_body":
        hub.cut("PUT /lfs/", times=8, after=2)  # more often than the client tries by itself
    else:
        hub.fail("POST .*/commit/", {"unavailable": 503, "other_commit": 412}[fault], times=2)
    upload_files(folder, "thing", "All")
    assert hub.repositories["user/thing"].files == contents(folder)
    if fault == "other_commit":  # which the client does not try again by itself
        assert caplog.text.count("Trying again in 0 s: ") == 2 and "412" in caplog.text
    assert len([status for method, _, status in hub.requests if method == "PUT" and status == 200]) == 1


@pytest.mark.parametrize("fault", ["quota", "no_room", "broken"])
def test_a_failure_that_stays_is_named_and_the_files_are_as_they_were(hub, folder, monkeypatch, fault):
    without_waiting(monkeypatch)
    before, reason, attempts = contents(folder), QUOTA_MESSAGE, 1
    if fault == "quota":
        HfApi().create_repo("thing", repo_type="dataset")
        hub.quota = 3
    elif fault == "no_room":
        hub.fail("PUT /lfs/", 507, message="Insufficient Storage")
        reason = "Insufficient Storage"
    else:
        hub.fail("/commit/", 500)
        reason, attempts = "500 Internal Server Error", 3
    with pytest.raises(OSError, match=re.escape(reason)) as error:
        upload_files(folder, "user/thing", "All", repo_type="dataset", allow_patterns=["*.md", "data/*"])
    assert str(error.value).startswith(f"{folder} is not uploaded to user/thing, and is as it was: ")
    command = f"hf upload user/thing {folder} . --repo-type dataset --include '*.md' --include 'data/*'"
    assert str(error.value).endswith(f"To upload it by hand: {command}")
    assert contents(folder) == before
    assert hub.count("lfs/objects/batch") == attempts
    assert hub.repositories["datasets/user/thing"].messages == []
