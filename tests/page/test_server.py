"""The page serves what people uploaded and what was made for them, to its own pages, and nothing else."""

import json
import re

import pytest
from fastapi.testclient import TestClient

from maetok_hf.page.abilities import LoadedPipeline
from maetok_hf.page.layout import build_page
from maetok_hf.page.server import LOCAL_HOSTS, is_local, make_app, open_port, private_folder
from tests.page.images import drawing
from tests.page.test_reconstruction import written
from tests.pipelines.helpers import tiny_pipeline


URL = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def client():
    with private_folder():
        page = build_page([LoadedPipeline(pipe=tiny_pipeline("sde"), name="a")])
        with TestClient(make_app(page, "", LOCAL_HOSTS), base_url=URL) as client:
            yield client


def post_file(client, path, **headers):
    with path.open("rb") as file:
        return client.post("/gradio_api/upload", files={"files": file}, headers=headers)


def reconstruct(client, pipeline, image):
    """What the server answers to an image in the field of the tab, and to the choice of a pipeline."""
    config = client.get("/config").json()
    labels = {component["id"]: component["props"].get("label") for component in config["components"]}
    function = next(
        one["id"] for one in config["dependencies"] if [labels[i] for i in one["inputs"]] == ["Pipeline", "Your image"]
    )
    body = {"data": [pipeline, image], "fn_index": function, "session_hash": "person"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    lines = client.get("/gradio_api/queue/data", params={"session_hash": "person"}).text.splitlines()
    answers = [json.loads(line.removeprefix("data:")) for line in lines if line]
    return next(answer for answer in answers if answer["msg"] == "process_completed")


def file_data(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


# Files


def test_an_upload_is_reconstructed(client, tmp_path):
    (path,) = post_file(client, written(tmp_path, drawing())).json()
    answer = reconstruct(client, 0, file_data(path))
    assert answer["success"] and "dB PSNR" in answer["output"]["data"][1]


@pytest.mark.parametrize("meta", [True, False], ids=["as a file", "as plain data"])
def test_an_image_that_nobody_uploaded_is_not_opened(meta, client, tmp_path):
    path = written(tmp_path, drawing(), "secret.png")
    answer = reconstruct(client, 0, file_data(path) if meta else {"path": str(path)})
    assert not answer["success"]
    assert re.search("not uploaded by a user" if meta else "no longer here: drop it again", answer["output"]["error"])


def test_no_field_copies_a_file_of_the_machine_to_where_it_is_served(client, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    answer = reconstruct(client, file_data(secret), None)
    assert not answer["success"] and "not uploaded by a user" in answer["output"]["error"]
    assert client.get(f"/gradio_api/file={secret}").status_code == 403


# Other sites


def test_a_page_of_this_machine_is_asked_for_by_no_other_name(client):
    for host, status in (("127.0.0.1:7860", 200), ("localhost", 200), ("[::1]:1", 200), ("evil.example:7860", 400)):
        assert client.get("/config", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # a program
        ({"sec-fetch-site": "same-origin", "origin": "https://proxy.example"}, 200),
        ({"origin": URL}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),  # another port of this machine
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
    ],
    ids=str,
)
def test_another_site_cannot_give_orders(headers, status, client, tmp_path):
    assert post_file(client, written(tmp_path, drawing()), **headers).status_code == status


def test_only_a_port_of_the_loopback_is_local():
    for host, local in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with open_port(host, 0) as sock:
            assert is_local(sock) == local
