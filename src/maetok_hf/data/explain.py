"""Errors of files, networks and disks, with what to do about them."""

import contextlib
import errno
from collections.abc import Iterator


# `huggingface_hub` and `fsspec` pass on the errors of the HTTP client they use, some of which are no `OSError`.
_HTTP_CLIENTS = ("aiohttp", "httpcore", "httpx", "requests", "urllib3")


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it was raised from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_of_the_system(error: Exception) -> bool:
    """Whether an error comes from a file system, a network or a disk rather than from code or data."""
    return isinstance(error, OSError) or any(c.__module__.startswith(_HTTP_CLIENTS) for c in type(error).__mro__)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one it was raised from, says that a disk or a quota is used up."""
    return any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in _chain(error))


def _with_message(error: Exception, message: str) -> OSError:
    explained = OSError(message)
    explained.errno = next((one.errno for one in _chain(error) if isinstance(one, OSError) and one.errno), None)
    return explained


def _advice(error: Exception, data: str) -> str:
    chain = _chain(error)
    if is_disk_full(error):
        return (
            "The disk is full: free some space, or set the environment variable HF_HOME, below which `datasets` keeps "
            "its files, to a folder on a disk with room."
        )
    access = (
        f"accept its terms at https://huggingface.co/datasets/{data} and log in with `hf auth login`, or set HF_TOKEN "
        "to a token of an account that has done so"
    )
    if any(type(one).__name__ == "GatedRepoError" or "gated dataset" in str(one) for one in chain):
        return f"The data set is gated: {access}."
    if any(isinstance(one, ConnectionError | TimeoutError) for one in chain):
        return (
            "The Hub cannot be reached: check the connection and the environment variable HF_HUB_OFFLINE. If a local "
            "folder is meant, check its path."
        )
    return (
        "If it is a folder, check the path and that it holds images, parquet or tar files. If it is on the Hub, check "
        f"the spelling and the connection; if it is private or gated, {access}."
    )


@contextlib.contextmanager
def opening(data: str) -> Iterator[None]:
    """
    Says what to do when a data set cannot be opened.

    Args:
        data (`str`): Its name or folder.

    Raises:
        OSError: For every error of files, networks and disks, with its `errno`.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_system(error):
            raise
        message = (
            f"The data set {data!r} could not be opened ({type(error).__name__}: {error}). {_advice(error, data)}"
        )
        raise _with_message(error, message) from error


@contextlib.contextmanager
def reading(description: str) -> Iterator[None]:
    """
    Says what to do when the rows of an open data set can no longer be read.

    Args:
        description (`str`): What it is.

    Raises:
        OSError: For every error of files, networks and disks, with its `errno`.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_the_system(error):
            raise
        message = (
            f"Reading {description} failed ({type(error).__name__}: {error}). That is not the fault of an image, so "
            "none is replaced: check the connection, the disk and the access, then continue from the last checkpoint."
        )
        raise _with_message(error, message) from error
