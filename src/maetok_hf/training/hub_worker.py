"""One upload to the Hub, in a process of its own: `python hub_worker.py REQUEST RESULT`, both JSON.

It stands alone (no other module of the library, and thus no torch, is imported), since [`~training.hub.HubUpload`]
starts one for every upload. Its result is written to the file `RESULT`.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar


logger = logging.getLogger(__name__)
T = TypeVar("T")
# of the Hub: timeout, a commit of someone else at the same moment (two of them), too many requests
PASSING_REFUSALS = (408, 409, 412, 429)
NO_ROOM = 507


def upload(
    repo_id: str,
    private: bool,
    folder: str | None,
    message: str,
    repo_type: str = "model",
    allow_patterns: list[str] | None = None,
) -> dict[str, Any]:
    """
    Create the repository if it does not exist, and commit a folder.

    Args:
        repo_id (`str`): Repository, with or without the namespace.
        private (`bool`): Make the repository private if it is created.
        folder (`str` or `None`): Folder to commit; `None` only checks that it could be done.
        message (`str`): Message of the commit.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        allow_patterns (`list[str]`, *optional*): Patterns of the files that are meant; by default all.

    Returns:
        `dict[str, Any]`: `repo_id` with its namespace.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type=repo_type, private=private or None, exist_ok=True)
    repo_id = repo_id if "/" in repo_id else url.repo_id
    if folder is None:
        # creating an existing repository also succeeds with a token that reads only
        api.auth_check(repo_id, repo_type=repo_type, write=True)
    else:
        api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=message,
            allow_patterns=allow_patterns,
        )
    return {"repo_id": repo_id}


def describe(error: Exception) -> dict[str, Any]:
    """
    What went wrong, and whether trying again is in vain.

    Args:
        error (`Exception`): The error.

    Returns:
        `dict[str, Any]`: `error` (a text of one line) and `permanent`: `True` for a refusal by the Hub (not for its
        failures, nor for too many requests or a commit that came first), for a full storage, for a request that
        cannot be made, and where no token is found.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    answer = error
    while not isinstance(answer, HfHubHTTPError) and answer.__cause__ is not None:
        answer = answer.__cause__  # the upload of a file wraps the Hub's answer
    if isinstance(answer, HfHubHTTPError):
        status = answer.response.status_code
        permanent = (400 <= status < 500 and status not in PASSING_REFUSALS) or status == NO_ROOM
    else:
        permanent = isinstance(answer, (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled))
    lines = [line.strip() for line in f"{type(answer).__name__}: {answer}".splitlines()]
    return {"error": " ".join(filter(None, lines)), "permanent": permanent}


def attempt(act: Callable[[], T], retry_waits: Sequence[float], parent: int | None = None) -> T | dict[str, Any]:
    """
    Try until it succeeds, is refused, or was tried often enough.

    Args:
        act (`Callable[[], T]`): What asks the Hub.
        retry_waits (`Sequence[float]`): Seconds to wait before each further attempt, after those that huggingface_hub
            makes itself.
        parent (`int`, *optional*): The process that waits for the result: without it there are no further attempts.

    Returns:
        What `act` returned, or what [`describe`] says of its last error.
    """
    for wait in [*retry_waits, None]:
        try:
            return act()
        except Exception as error:
            failure = describe(error)
        if wait is None or failure["permanent"] or parent not in (None, os.getppid()):
            break
        logger.warning("Trying again in %g s: %s", wait, failure["error"])
        time.sleep(wait)
    return failure


def run(request: dict[str, Any], retry_waits: list[float], parent: int) -> dict[str, Any]:
    """
    Upload for another process.

    Args:
        request (`dict[str, Any]`): Arguments of [`upload`].
        retry_waits (`list[float]`): See [`attempt`].
        parent (`int`): See [`attempt`].

    Returns:
        `dict[str, Any]`: What [`upload`] or [`describe`] returned.
    """
    return attempt(lambda: upload(**request), retry_waits, parent)


def main():
    """Read the request, write the result: whole, or none if this process is killed."""
    request = json.loads(sys.argv[1])
    result = Path(sys.argv[2])
    temporary = result.with_suffix(".tmp")
    temporary.write_text(json.dumps(run(**request)), encoding="utf-8")
    os.replace(temporary, result)


if __name__ == "__main__":
    main()
