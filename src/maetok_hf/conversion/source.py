"""Where a checkpoint comes from: its repository, the exact commit, and what is said there of its licence."""

import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, metadata_load
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError


_CARD = "README.md"
_CARD_BYTES = 2**20
_LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING)([._-]\w+)*", re.IGNORECASE)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Source:
    """
    A checkpoint's origin, as it may be published.

    Args:
        part (`str`): What was converted: `"tokenizer"` or `"transformer"`.
        name (`str`): Repository, or of a local checkpoint the last part of its path.
        on_hub (`bool`): Whether it is a repository of the Hub.
        revision (`str`, *optional*): Commit of the repository, if it could be asked for.
        licence_file (`str`, *optional*): Name of the licence file beside the weights.
        stated_licence (`str`, *optional*): Identifier of the licence that the card names.
        licence_looked_up (`bool`): Whether that is known; else there may be a licence that the two above lack.
    """

    part: str
    name: str
    on_hub: bool
    revision: str | None = None
    licence_file: str | None = None
    stated_licence: str | None = None
    licence_looked_up: bool = True


def is_licence(value: Any) -> bool:
    """Whether a value can be a licence as the Hub writes it: text of strangers goes into cards in no other form."""
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


def _licence_file(names: list[str]) -> str | None:
    return next((name for name in sorted(names) if _LICENCE_FILE.fullmatch(name)), None)


def _card_licence(card: Path) -> str | None:
    if not card.is_file() or card.stat().st_size > _CARD_BYTES:
        return None
    try:
        metadata = metadata_load(card)
    except Exception:  # YAML of strangers: no licence can be read from it
        return None
    licence = metadata.get("license") if isinstance(metadata, dict) else None
    return licence if is_licence(licence) else None


def find_source(
    part: str, path_or_repo_id: str | Path, revision: str | None = None, token: str | bool | None = None
) -> Source:
    """
    Look a checkpoint's origin up, before anything large is downloaded.

    Args:
        part (`str`): `"tokenizer"` or `"transformer"`.
        path_or_repo_id (`str` or `Path`): Folder, `.pt` file or Hub repo.
        revision (`str`, *optional*): Branch, tag or commit of the Hub repo.
        token (`str` or `bool`, *optional*): Hub token.

    Returns:
        [`Source`]: Its origin. Where the Hub cannot be reached its files may still be in the cache: then without a
        commit, and the licence is not looked up.

    Raises:
        ValueError: If a revision is given for a local checkpoint, or the name cannot be that of a repo.
        OSError: If the Hub has no such repo or revision, or refuses access.
    """
    path = Path(path_or_repo_id)
    if path.exists() or path.suffix in (".pt", ".pth"):
        if revision is not None:
            raise ValueError(f"a revision, {revision!r}, has no meaning for the local checkpoint {path}: remove it.")
        folder = path if path.is_dir() else path.parent
        names = [file.name for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
        return Source(
            part=part,
            name=path.resolve().name,
            on_hub=False,
            licence_file=_licence_file(names),
            stated_licence=_card_licence(folder / _CARD),
        )
    name = str(path_or_repo_id)
    if path.is_absolute() or name.startswith((".", "~")):
        raise OSError(f"{name} is neither a folder nor a Hub repo id.")
    try:
        info = HfApi(token=token).model_info(name, revision=revision)
        names = [file.rfilename for file in info.siblings or []]
        card = hf_hub_download(name, _CARD, revision=info.sha, token=token) if _CARD in names else None
    except (RepositoryNotFoundError, RevisionNotFoundError, ValueError):
        raise
    except HfHubHTTPError as error:
        advice = ""
        if error.response.status_code == HTTPStatus.UNAUTHORIZED:
            advice = ". Log in with `hf auth login`, or set HF_TOKEN to a valid token."
        raise OSError(" ".join(str(error).split()) + advice) from error  # its lines are far apart
    except Exception:  # no connection, of which each HTTP library has its own errors
        return Source(part=part, name=name, on_hub=True, licence_looked_up=False)
    return Source(
        part=part,
        name=name,
        on_hub=True,
        revision=info.sha,
        licence_file=_licence_file(names),
        stated_licence=None if card is None else _card_licence(Path(card)),
    )
