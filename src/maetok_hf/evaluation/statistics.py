"""Mean and covariance of features in float64, in files that ADM's suite reads."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..moments import RunningMoments


# where the reference files of ADM (guided diffusion) keep mean and covariance of a layer
ADM_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Moments(NamedTuple):
    """
    What a Fréchet distance needs of a set of features.

    Args:
        mean (`torch.Tensor` of shape `(dim,)`): float64.
        covariance (`torch.Tensor` of shape `(dim, dim)`): float64, divided by one less than the number of samples.
        num_samples (`int`, *optional*): Samples; `None` where a file of another program does not say.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    num_samples: int | None = None


def feature_moments(running: RunningMoments) -> Moments:
    """
    Mean and covariance of features that were added one batch after the other.

    Args:
        running ([`RunningMoments`]): With the whole scatter.

    Returns:
        [`Moments`]: On the CPU.

    Raises:
        ValueError: If there are fewer than two samples.
    """
    if running.count < 2:
        raise ValueError(f"A covariance needs two samples, got {running.count}.")
    return Moments(running.mean.cpu(), running.scatter.cpu() / (running.count - 1), running.count)


def save_moments(path: str | Path, moments: Mapping[str, Moments], protocol: Mapping[str, Any]) -> None:
    """
    Write statistics under the keys of ADM's reference files, together with how they came about; the file is whole or
    absent.

    Args:
        path (`str` or `Path`): The `.npz` file; an earlier one is replaced.
        moments (`Mapping[str, Moments]`): Statistics of `"pool"`, and of `"spatial"` if there are any.
        protocol (`Mapping[str, Any]`): Whatever [`load_moments`] shall compare, such as the extractor's digest; plain
            types.

    Raises:
        ValueError: If a layer has another name.
    """
    if not moments or moments.keys() - ADM_KEYS.keys():
        raise ValueError(f"`moments` must be of the layers {', '.join(map(repr, ADM_KEYS))}, got {list(moments)}.")
    arrays = {}
    for layer, (mean, covariance, num_samples) in moments.items():
        mean_key, covariance_key = ADM_KEYS[layer]
        arrays |= {mean_key: mean.numpy(), covariance_key: covariance.numpy()}
        if num_samples is not None:
            arrays[f"num_samples_{layer}"] = np.int64(num_samples)
    write_arrays(path, arrays | {"protocol": np.array(json.dumps(dict(protocol), sort_keys=True))})


def load_moments(
    path: str | Path, expected: Mapping[str, Any] | None = None
) -> tuple[dict[str, Moments], dict[str, Any] | None]:
    """
    Read statistics: a file of [`save_moments`], or a reference file of ADM such as `VIRTUAL_imagenet256_labeled.npz`.

    Args:
        path (`str` or `Path`): The `.npz` file. Images in it are not read.
        expected (`Mapping[str, Any]`, *optional*): What the recorded protocol must say, such as the extractor's
            digest. A file of ADM records nothing, so nothing is compared.

    Returns:
        `tuple[dict[str, Moments], dict[str, Any] | None]`: Statistics by layer, `"pool"` and if present `"spatial"`,
        and the protocol, `None` in a file of ADM.

    Raises:
        ValueError: If the file holds no statistics, or those of another protocol.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            moments = _moments_of(path, file)
            protocol = json.loads(str(file["protocol"])) if "protocol" in file.files else None
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is no whole .npz file ({error}): make or download it again.") from error
    if protocol is not None:
        differing = [name for name, value in (expected or {}).items() if protocol.get(name) != value]
        if differing:
            lines = "\n".join(f"  {name}: {protocol.get(name)!r} there, {expected[name]!r} now" for name in differing)
            raise ValueError(f"{path} holds statistics of another protocol:\n{lines}\nMake them again.")
    return moments, protocol


def _moments_of(path: Path, file: Any) -> dict[str, Moments]:
    moments = {}
    for layer, keys in ADM_KEYS.items():
        if not set(keys) <= set(file.files):
            continue
        mean, covariance = (torch.from_numpy(np.asarray(file[key], dtype=np.float64)) for key in keys)
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{path} has {keys[0]} of shape {tuple(mean.shape)} and {keys[1]} of {tuple(covariance.shape)}, but "
                "they must be (d,) and (d, d)."
            )
        count = f"num_samples_{layer}"
        moments[layer] = Moments(mean, covariance, int(file[count]) if count in file.files else None)
    if not moments:
        raise ValueError(
            f"{path} holds no statistics ('mu' and 'sigma'), only {', '.join(file.files) or 'nothing'}: if it holds "
            "images, read it with `NpzImages`."
        )
    return moments


def write_arrays(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """
    Write an uncompressed `.npz` file that is whole or absent, flushed to the disk; its folder is made if needed.

    Args:
        path (`str` or `Path`): The file; an earlier one is replaced.
        arrays (`Mapping[str, numpy.ndarray]`): By name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
