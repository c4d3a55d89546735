"""The clients of this process, which have read their environment when they were imported."""

import sys
import time
from pathlib import Path

import pytest

from .state import TOKEN, LoopbackHub


def connect_clients(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub, home: Path, token: str | None = TOKEN) -> None:
    """
    Make huggingface_hub, datasets, diffusers and peft, here and in processes to be started, use a Hub.

    Args:
        monkeypatch: Undoes it.
        hub: The Hub.
        home: Folder of their caches and login.
        token: The token they are logged in with.
    """
    import datasets.config
    import diffusers.utils.constants
    from huggingface_hub import HfFileSystem, constants, hf_api
    from huggingface_hub.utils import _git_credential, _http

    for name, value in (hub.environment(token) | {"HF_HOME": str(home)}).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    cache, host = str(home / "hub"), hub.endpoint.rpartition(":")[0].removeprefix("http://")
    for module, values in {
        constants: {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": frozenset({host}),
            "HF_HOME": str(home),
            "HF_HUB_CACHE": cache,
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        },
        _http: {"_HUB_ORIGINS": frozenset({_http._url_origin(hub.endpoint)})},
        _git_credential: {"ENDPOINT": hub.endpoint},
        hf_api.api: {"endpoint": hub.endpoint},
        datasets.config: {
            "HF_ENDPOINT": hub.endpoint,
            "HUB_DATASETS_URL": hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
            "HF_HUB_OFFLINE": False,
            "HF_DATASETS_OFFLINE": False,
            "HF_UPDATE_DOWNLOAD_COUNTS": False,  # by a request to elsewhere
            "HF_DATASETS_CACHE": home / "datasets",
        },
        diffusers.utils.constants: {"HUGGINGFACE_CO_RESOLVE_ENDPOINT": hub.endpoint},
    }.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    HfFileSystem.clear_instance_cache()  # which holds what another Hub has said


def remembered_endpoints(address: str) -> set[str]:
    """Names of all global variables of the clients that hold an address."""
    return {
        f"{module_name}.{name}"
        for module_name, module in list(sys.modules.items())
        if module_name.split(".")[0] in ("huggingface_hub", "datasets")
        for name, value in list(vars(module).items())
        if isinstance(value, str) and value.startswith(address) and not name.startswith("__")
    }


class QuickClock:
    """The module `time`, whose `sleep` only remembers for how long it was asked."""

    def __init__(self):
        self.waits: list[float] = []

    def __getattr__(self, name: str):
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def without_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """
    Let the clients of this process try again at once.

    Returns:
        The seconds they would have waited, as they ask for them.
    """
    import datasets.utils.file_utils
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    clock = QuickClock()
    for module in (_http, file_download, datasets.utils.file_utils):
        monkeypatch.setattr(module, "time", clock)
    return clock.waits
