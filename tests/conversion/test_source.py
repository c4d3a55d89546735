"""Where a checkpoint comes from, and what is said of its licence there."""

import pytest
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from maetok_hf.conversion.source import Source, find_source


CARD = b"---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model\n"


def test_folders_are_named_without_their_path(tmp_path):
    folder = tmp_path / "private" / "tokenizer"
    folder.mkdir(parents=True)
    expected = Source(part="tokenizer", name="tokenizer", on_hub=False)
    assert find_source("tokenizer", folder) == expected
    (folder / "README.md").write_bytes(CARD)
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "0100000.pt").write_text("")
    found = find_source("tokenizer", str(folder / "0100000.pt"))
    assert (found.name, found.licence_file, found.stated_licence) == ("0100000.pt", "LICENSE.txt", "apache-2.0")
    with pytest.raises(ValueError, match="'main', has no meaning for the local checkpoint"):
        find_source("tokenizer", folder, "main")


@pytest.mark.parametrize(
    "card",
    [
        "no metadata",
        "---\nlicense: [mit, other]\n---\n",
        "---\nlicense: '<script>alert(1)</script>'\n---\n",
        "---\nlicense: " + "a" * 100 + "\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: !!python/object/apply:os.system [ls]\n---\n",
        "---\n{ \n---\n",
        "---\nlicense: mit\n---\n" + " " * 2**20,
    ],
)
def test_cards_of_strangers_give_an_identifier_or_nothing(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert find_source("tokenizer", tmp_path).stated_licence is None


def test_repositories_are_asked_for_their_commit_and_licence(hub):
    repository = hub.add("MAETok/maetok-b-128", {"README.md": CARD, "config.json": b"{}"})
    first = repository.sha
    expected = Source(
        part="tokenizer", name="MAETok/maetok-b-128", on_hub=True, revision=first, stated_licence="apache-2.0"
    )
    assert find_source("tokenizer", "MAETok/maetok-b-128") == expected
    repository.commit("licence", {"LICENSE": b"terms", "README.md": None})
    found = find_source("tokenizer", "MAETok/maetok-b-128")
    assert (found.revision, found.licence_file, found.stated_licence) == (repository.sha, "LICENSE", None)
    assert find_source("tokenizer", "MAETok/maetok-b-128", first) == expected
    with pytest.raises(RevisionNotFoundError):
        find_source("tokenizer", "MAETok/maetok-b-128", "v2")
    with pytest.raises(RepositoryNotFoundError):
        find_source("tokenizer", "MAETok/another")


def test_without_a_connection_nothing_is_claimed(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("maetok_hf.conversion.source.HfApi.model_info", fail)
    found = find_source("transformer", "MAETok/sit-xl_maetok-b-128")
    assert (found.revision, found.stated_licence, found.licence_looked_up) == (None, None, False)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "../x"])
def test_paths_are_not_taken_for_repositories(name):
    with pytest.raises(OSError, match="neither a folder nor a Hub repo id"):
        find_source("tokenizer", name)


@pytest.mark.parametrize("name", ["a/b/c", "org/..", "a b/c"])
def test_names_that_are_none_are_refused(name):
    with pytest.raises(ValueError, match="Repo id"):
        find_source("tokenizer", name)
