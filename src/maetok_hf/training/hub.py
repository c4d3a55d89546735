"""`--push_to_hub`: a model on its way to the Hub while training goes on.

Uploads run in processes of their own. The training process thus keeps its interpreter lock, may fork data workers at
any time, and may end without waiting for a connection that hangs.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


logger = logging.getLogger(__name__)

WORKER = Path(__file__).with_name("hub_worker.py")
RETRY_WAITS = (10.0, 60.0, 300.0)
CHECK_TIMEOUT = 120.0
SHOWN_OUTPUT = 400  # characters of a crashed worker's output


class HubUpload:
    """
    Uploads models to one repository of the Hub, one at a time, in the background.

    Each request is a snapshot of its files, so the run may replace them at once; a request that still waits when the
    next one comes is dropped for it. Nothing that fails after the start raises: a warning gives the command that
    uploads the same files by hand, and training goes on.

    Only one process of a run may make one of these.

    Args:
        repo_id (`str`):
            Repository, with or without a namespace; without one it is the user's own. It is created if it does not
            exist.
        output_dir (`str` or `Path`):
            Folder of the run; snapshots are in its subfolder `hub_upload`, as hard links where the file system has
            them.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private if it is created.
        retry_waits (`Sequence[float]`, *optional*, defaults to `(10.0, 60.0, 300.0)`):
            Seconds before each further attempt after a failure of the Hub or the network, besides the attempts that
            huggingface_hub makes itself.

    Raises:
        ValueError: If the Hub refuses: no token or a wrong one, no permission, a name that is not possible. When the
            Hub cannot be reached there is a warning only, since it may be back when the first model is there.
    """

    def __init__(
        self,
        repo_id: str,
        output_dir: str | Path,
        *,
        private: bool = False,
        retry_waits: Sequence[float] = RETRY_WAITS,
    ):
        self.repo_id = repo_id
        self._private = private
        self._retry_waits = list(retry_waits)
        self._folder = Path(output_dir).resolve() / "hub_upload"
        self._requested = self._uploaded = 0  # numbers of requests, from 1
        self._waiting: tuple[int, str] | None = None
        self._process: subprocess.Popen | None = None
        self._closed = self._given_up = False
        self._changed = threading.Condition()
        shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier start, which will upload its files again
        self._folder.mkdir(parents=True)
        self._check()
        self._thread = threading.Thread(target=self._work, name="hub-upload", daemon=True)
        self._thread.start()

    def start(self, sources: Mapping[str, str | Path], message: str) -> None:
        """
        Upload files in the background.

        Args:
            sources (`Mapping[str, str | Path]`): Files and folders by their path in the repository; a folder under
                `"."` lends its contents. The run may replace or remove them afterwards, but not write into them.
            message (`str`): Message of the commit, such as `"Step 5000"`.
        """
        self._requested += 1
        snapshot = self._snapshot(self._requested)
        try:
            for path, source in sources.items():
                _link(Path(source).resolve(), snapshot / path)
        except OSError as error:
            shutil.rmtree(snapshot, ignore_errors=True)
            logger.warning("%s is not uploaded to %s, training goes on: %s", message, self.repo_id, error)
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._snapshot(self._waiting[0]), ignore_errors=True)
            self._waiting = (self._requested, message)
            self._changed.notify()

    def finish(self, timeout: float = 900.0) -> bool:
        """
        Wait for the uploads that are under way or waiting; after it there are no further ones.

        Args:
            timeout (`float`, *optional*, defaults to 900.0): Seconds after which they are given up.

        Returns:
            `bool`: Whether the last request is on the Hub.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._changed:
                self._given_up = True
                if self._process is not None:
                    self._process.kill()
            self._thread.join()
        if self._uploaded < self._requested:
            return False
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def _check(self) -> None:
        result = self._run(None, "", [], CHECK_TIMEOUT)
        if "error" not in result:
            self.repo_id = result["repo_id"]
        elif result["permanent"]:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise refusal("hub_model_id", self.repo_id, result["error"])
        else:
            logger.warning(
                "The Hub cannot be reached, uploads to %s are tried nevertheless: %s", self.repo_id, result["error"]
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                (number, message), self._waiting = self._waiting, None
            result = self._run(self._snapshot(number), message, self._retry_waits)
            failed = "error" in result
            # The files of a failed upload are kept for one by hand, until there are newer ones.
            for old in range(1, number + (not failed)):
                shutil.rmtree(self._snapshot(old), ignore_errors=True)
            if failed:
                logger.warning(
                    "%s is not uploaded, training goes on: %s\nTo upload it by hand: hf upload %s %s",
                    message,
                    result["error"],
                    self.repo_id,
                    self._snapshot(number),
                )
            else:
                self.repo_id, self._uploaded = result["repo_id"], number
                logger.info("%s is on the Hub: %s", message, self.repo_id)

    def _run(
        self, folder: Path | None, message: str, waits: list[float], timeout: float | None = None
    ) -> dict[str, Any]:
        """What a worker answers: `repo_id`, or `error` and `permanent`."""
        arguments = {"repo_id": self.repo_id, "private": self._private, "folder": folder and str(folder)}
        request = {"request": arguments | {"message": message}, "retry_waits": waits, "parent": os.getpid()}
        result, output = self._folder / "result.json", self._folder / "output.txt"
        try:
            result.unlink(missing_ok=True)
            status = self._call(request, result, output, timeout)
            if result.is_file():
                return json.loads(result.read_text(encoding="utf-8"))
            end = output.read_text(encoding="utf-8", errors="replace").strip()[-SHOWN_OUTPUT:]
        except subprocess.TimeoutExpired:
            return _failure(f"no answer within {timeout:g} seconds")
        except OSError as error:
            return _failure(f"{type(error).__name__}: {error}")
        return _failure("it took too long" if self._given_up else f"the upload ended with status {status}. {end}")

    def _call(self, request: dict[str, Any], result: Path, output: Path, timeout: float | None) -> int:
        """Run a worker. It has no pipes: data workers that are forked meanwhile would keep their ends open."""
        with open(output, "wb") as file, self._changed:
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER), json.dumps(request), str(result)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                start_new_session=True,  # Ctrl-C is for the training process, which then waits for the upload
            )
            if self._given_up:
                process.kill()
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    def _snapshot(self, number: int) -> Path:
        return self._folder / str(number)


def refusal(name: str, repo_id: str, reason: str) -> ValueError:
    """
    The error for a repository to which nothing can be uploaded.

    Args:
        name (`str`): Option that names the repository.
        repo_id (`str`): The repository.
        reason (`str`): What the Hub says.

    Returns:
        `ValueError`: With what to do about it.
    """
    return ValueError(
        f"Nothing can be uploaded to `{name}` = {repo_id!r}: {reason}\n"
        f"Log in with `hf auth login` and a token that may write (or set HF_TOKEN), give `{name}` a "
        "namespace in which that token may write, or leave `push_to_hub` out."
    )


def _failure(text: str) -> dict[str, Any]:
    return {"error": text, "permanent": False}


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it; of a folder all files below it."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.is_file():
                _link(path, target / path.relative_to(source))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
