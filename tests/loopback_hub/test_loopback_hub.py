"""The loopback Hub keeps what the real clients expect of the Hub."""

import hashlib
import json
import time
import urllib.request

import datasets
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import QUOTA_MESSAGE, READ_TOKEN, TOKEN, connect_clients, serve_hub, without_waiting
from .clients import remembered_endpoints


WEIGHTS = bytes(range(256)) * 40


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """Regular and large files, in a folder and above it."""
    (tmp_path / "model" / "vae").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "vae" / "weights.safetensors").write_bytes(WEIGHTS)
    return tmp_path / "model"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_client_remembers_another_hub(hub):
    public = "https://huggingface.co"
    left = {name for name in remembered_endpoints(public) if "_HF_DEFAULT_ENDPOINT" not in name}
    # addresses of documentation pages and of code that no request is made to
    assert {
        name for name in left if "ENDPOINT" in name or "URL_TEMPLATE" in name or name.endswith("DATASETS_URL")
    } == set()


def test_a_second_hub_is_met_without_memories_of_the_first(hub, tmp_path):
    hub.add("datasets/user/data", {"a.txt": b"first"})
    assert HfFileSystem().cat("datasets/user/data/a.txt") == b"first"
    with serve_hub() as other, pytest.MonkeyPatch.context() as patch:
        other.add("datasets/user/data", {"a.txt": b"second"})
        connect_clients(patch, other, tmp_path / "other")
        assert HfFileSystem().cat("datasets/user/data/a.txt") == b"second"
        assert HfApi().endpoint == other.endpoint


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("part_size", [None, 1000], ids=["basic", "multipart"])
def test_a_folder_comes_back_as_it_was(api, hub, folder, tmp_path, kind, part_size):
    hub.part_size = part_size
    url = api.create_repo("thing", repo_type=kind)
    assert url.repo_id == "user/thing"
    api.upload_folder(repo_id="user/thing", repo_type=kind, folder_path=folder, commit_message="All of it")
    name = "user/thing" if kind == "model" else "datasets/user/thing"
    assert hub.repositories[name].messages == ["All of it"]
    assert hub.count("PUT /lfs/.*/[0-9]+$") == (0 if part_size is None else 11)
    download = snapshot_download("user/thing", repo_type=kind)
    assert contents(tmp_path / download) == contents(folder)
    # a second upload sends and commits nothing
    sent = hub.count("PUT|/commit/")
    api.upload_folder(repo_id="user/thing", repo_type=kind, folder_path=folder)
    assert hub.count("PUT|/commit/") == sent


def test_a_token_never_reaches_the_storage(api, hub, folder):
    api.create_repo("user/secret", private=True)
    api.upload_folder(repo_id="user/secret", folder_path=folder)
    hf_hub_download("user/secret", "vae/weights.safetensors")
    assert hub.count("GET /lfs/") == 1 and hub.count("PUT /lfs/") == 1  # which refuses one
    address = f"{hub.storage}/lfs/{hashlib.sha256(WEIGHTS).hexdigest()}"
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Authorization": f"Bearer {TOKEN}"}))


def test_a_cached_file_is_not_downloaded_again(hub):
    hub.add("user/model", {"weights.safetensors": WEIGHTS, "config.json": b"{}"})
    for _ in range(2):
        for name in ("weights.safetensors", "config.json"):
            hf_hub_download("user/model", name)
    assert hub.count("GET /lfs/") == 1 and hub.count("GET /user/model/resolve/main/config.json") == 1
    hub.repositories["user/model"].commit("new", {"config.json": b'{"new": 1}'})
    with open(hf_hub_download("user/model", "config.json")) as file:
        assert json.load(file) == {"new": 1}


def test_listings(api, hub):
    hub.page_size = 2
    hub.add("user/first", {"a/b/c.json": b"1", "a/d.bin": b"22", "e.txt": b"333"})
    hub.add("user/second", private=True)
    hub.add("other/third")
    assert [model.id for model in api.list_models(author="user")] == ["user/first", "user/second"]
    assert [model.id for model in api.list_models(author="user", token=False)] == ["user/first"]
    assert api.list_repo_files("user/first") == ["a/b/c.json", "a/d.bin", "e.txt"]
    entries = {entry.path: type(entry).__name__ for entry in api.list_repo_tree("user/first", recursive=True)}
    assert entries == {
        "a": "RepoFolder",
        "a/b": "RepoFolder",
        "a/b/c.json": "RepoFile",
        "a/d.bin": "RepoFile",
        "e.txt": "RepoFile",
    }
    assert [entry.path for entry in api.list_repo_tree("user/first", "a")] == ["a/b", "a/d.bin"]
    (file,) = api.get_paths_info("user/first", ["a/d.bin", "missing"])
    assert file.size == 2 and file.lfs.sha256 == hashlib.sha256(b"22").hexdigest()
    assert api.model_info("user/first", files_metadata=True).siblings[1].size == 2
    assert api.file_exists("user/first", "e.txt") and not api.file_exists("user/first", "f.txt")
    assert api.repo_exists("user/first") and not api.repo_exists("user/fourth")
    assert [commit.title for commit in api.list_repo_commits("user/first")] == ["first files", "initial commit"]


def test_revisions(api, hub):
    api.create_repo("model")
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="user/model").oid
    api.create_tag("user/model", tag="v1")
    api.create_branch("user/model", branch="next/one")
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id="user/model", revision="next/one")
    found = {}
    for revision in ("main", "v1", "next/one", first, first[:7]):
        with open(hf_hub_download("user/model", "a.txt", revision=revision)) as file:
            found[revision] = file.read()
    assert found == {"main": "1", "v1": "1", "next/one": "2", first: "1", first[:7]: "1"}
    refs = api.list_repo_refs("user/model")
    assert {ref.name for ref in refs.branches} == {"main", "next/one"} and [ref.name for ref in refs.tags] == ["v1"]
    api.delete_branch("user/model", branch="next/one")
    api.delete_tag("user/model", tag="v1")
    for revision in ("next/one", "v1", "0" * 40):
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download("user/model", "a.txt", revision=revision)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/model", "b.txt")


def test_a_pull_request_leaves_the_branch_as_it_is(api, hub):
    hub.add("user/model", {"a.txt": b"1"})
    addition = CommitOperationAdd("a.txt", b"2")
    opened = api.create_commit("user/model", [addition], commit_message="Change", create_pr=True)
    assert opened.pr_num == 1
    assert hub.repositories["user/model"].files == {"a.txt": b"1"}
    with open(hf_hub_download("user/model", "a.txt", revision="refs/pr/1")) as file:
        assert file.read() == "2"


def test_deletions_and_conflicts(api, hub):
    repository = hub.add("user/model", {"a.txt": b"1", "b/c.txt": b"2", "b/d.txt": b"3"})
    before = repository.sha
    api.create_commit("user/model", [CommitOperationDelete("b/", is_folder=True)], commit_message="Less")
    assert repository.files == {"a.txt": b"1"}
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit("user/model", [CommitOperationDelete("a.txt")], commit_message="Late", parent_commit=before)
    api.delete_repo("user/model")
    assert hub.repositories == {}


def test_who_may_read_and_write(api, hub):
    hub.add("user/private", {"a.txt": b"1"}, private=True)
    gated = hub.add("other/gated", {"a.txt": b"1"}, gated=True)
    hub.add("user/public", {"a.txt": b"1"})
    assert api.whoami()["name"] == "user"
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/private", "a.txt", token=False)
    for token in (TOKEN, READ_TOKEN):
        hf_hub_download("user/private", "a.txt", token=token)
    hf_hub_download("user/public", "a.txt", token=False)
    for token in (TOKEN, False):
        with pytest.raises(GatedRepoError):
            hf_hub_download("other/gated", "a.txt", token=token)
    gated.accepted.add(TOKEN)
    hf_hub_download("other/gated", "a.txt")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("user/public", token="hf_wrong")
    for repo_id, token in (("user/public", READ_TOKEN), ("other/gated", TOKEN)):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo_id, token=token)


def test_a_card_is_checked(api, hub):
    hub.add("user/model")
    results = "  results:\n  - task: {type: image-classification}\n    dataset: {type: mnist, name: MNIST}\n"
    index = f"---\nlicense: mit\nmodel-index:\n- name: model\n{results}"
    right = f"{index}    metrics:\n    - {{type: accuracy, value: 0.5}}\n---\n# A model\n"
    for content, name in {
        f"{index}---\n": "metrics",
        right.replace("mnist", "1"): "dataset.type",
        "---\nlicense: [1]\n---\n": "license",
    }.items():
        with pytest.raises(ValueError, match=f'Invalid metadata in README.md.\n- "[^"]*{name}"'):
            api.upload_file(path_or_fileobj=content.encode(), path_in_repo="README.md", repo_id="user/model")
    with pytest.raises(ValueError, match="license"):
        ModelCard(content).validate()
    ModelCard(right).push_to_hub("user/model")
    assert ModelCard.load("user/model").data.license == "mit"


def test_a_data_set_is_streamed(hub):
    pushed = datasets.Dataset.from_dict({"number": list(range(10))})
    pushed.push_to_hub("user/numbers")
    assert "datasets/user/numbers" in hub.repositories
    rows = datasets.load_dataset("user/numbers", split="train", streaming=True)
    assert [row["number"] for row in rows] == list(range(10))


def test_parts_of_a_file(hub):
    hub.add("user/model", {"weights.safetensors": WEIGHTS, "a.txt": b"0123456789"})
    assert HfFileSystem().cat_file("user/model/a.txt", start=2, end=5) == b"234"
    with HfFileSystem().open("user/model/weights.safetensors", block_size=64) as file:
        file.seek(1000)
        assert file.read(10) == WEIGHTS[1000:1010]
    assert all(status in (206, 302) for _, path, status in hub.requests if "/resolve/" in path or "/lfs/" in path)


# Faults


def test_refusals_and_cuts_pass(hub, monkeypatch):
    waits = without_waiting(monkeypatch)
    hub.add("user/model", {"weights.safetensors": WEIGHTS})
    hub.fail("HEAD /user/model/resolve/", 503, times=1)
    hub.fail("GET /lfs/", 429, times=1, headers={"Retry-After": "7"})
    hub.cut("GET /lfs/", times=2, after=4000)
    with open(hf_hub_download("user/model", "weights.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS
    assert 8.0 in waits  # the Hub's seconds and one for rounding
    statuses = [status for method, path, status in hub.requests if path.startswith("/lfs/")]
    assert statuses == [429, 200, 200, 200]


def test_an_upload_is_cut_in_its_body(hub, api, folder, monkeypatch):
    without_waiting(monkeypatch)
    api.create_repo("model")
    hub.cut("PUT /lfs/", times=1, after=100)
    api.upload_folder(repo_id="user/model", folder_path=folder)
    assert [status for method, _, status in hub.requests if method == "PUT"] == [None, 200]
    assert hub.repositories["user/model"].files["vae/weights.safetensors"] == WEIGHTS


def test_a_quota_is_used_up(hub, api, folder):
    api.create_repo("model")
    hub.quota = len(WEIGHTS) - 1
    with pytest.raises(HfHubHTTPError, match=f"403 Forbidden: {QUOTA_MESSAGE}"):
        api.upload_folder(repo_id="user/model", folder_path=folder)
    assert hub.repositories["user/model"].messages == [] and hub.large_files == {}


def test_a_slow_answer_is_late(hub, api):
    hub.slow("whoami", seconds=0.2, times=1)
    started = time.monotonic()
    api.whoami()
    assert time.monotonic() - started >= 0.2
