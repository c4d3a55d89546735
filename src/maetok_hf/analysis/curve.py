"""Likelihood of latents under Gaussian mixtures of growing size: the analysis behind MAETok's claim about modes.

Latents are flattened, reduced to the principal components that hold more than 90 % of the variance of the training
latents, and standardised by their mean and deviation there. Mixtures of several sizes are then fitted to the training
latents and judged by the negative log-likelihood of held-out ones: a latent space of fewer modes needs fewer
components for the same likelihood.

Standardised principal components are uncorrelated and of variance 1, so one Gaussian has the same likelihood per
dimension on the training latents of every tokenizer. What tokenizers differ in, besides the number of dimensions, is
how far mixtures get below it.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..training.checkpointing import write_json
from .mixture import CovarianceType, GaussianMixture, Initialization, draw_mixture, fit_mixture
from .principal_components import PrincipalComponents, fit_principal_components
from .rows import Rows, iterate_rows


logger = logging.getLogger(__name__)

# by which the same data may differ between devices and divisions into chunks
_SAME = 1e-5


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """
    How the mixtures of a curve are fitted, see [`draw_mixture`] and [`fit_mixture`].

    Args:
        covariance (`str`, *optional*, defaults to `"diag"`): `"diag"` or `"full"`.
        initialization (`str`, *optional*, defaults to `"kmeans++"`): `"kmeans++"` or `"random"`.
        reg_covar (`float`, *optional*, defaults to 1e-6): Added to all variances.
        tolerance (`float`, *optional*, defaults to 1e-3): Change of the mean log-likelihood at which to stop.
        max_iterations (`int`, *optional*, defaults to 100): Iterations at which to stop.
        variance (`float`, *optional*, defaults to 0.9): Fraction of the variance that the principal components exceed.
    """

    covariance: CovarianceType = "diag"
    initialization: Initialization = "kmeans++"
    reg_covar: float = 1e-6
    tolerance: float = 1e-3
    max_iterations: int = 100
    variance: float = 0.9


@dataclass(frozen=True, kw_only=True)
class MixtureData:
    """
    What the mixtures of a curve are fitted to.

    Args:
        num_train (`int`): Number of training latents.
        num_held_out (`int`): Number of held-out latents.
        num_features (`int`): Length of a flattened latent.
        num_dimensions (`int`): Number of principal components.
        total_variance (`float`): Sum of the variances of the features over the training latents.
        explained_variance (`float`): Fraction of it that the principal components hold.
        effective_rank (`float`): Effective rank of the flattened training latents minus their mean.
        gaussian_train_nll (`float`): Mean negative log-likelihood of the training latents, standardised, under one
            standard normal distribution, in nats.
        gaussian_held_out_nll (`float`): That of the held-out latents.
    """

    num_train: int
    num_held_out: int
    num_features: int
    num_dimensions: int
    total_variance: float
    explained_variance: float
    effective_rank: float
    gaussian_train_nll: float
    gaussian_held_out_nll: float


@dataclass(frozen=True, kw_only=True)
class MixtureCell:
    """
    One mixture of a curve.

    Args:
        num_components (`int`): Its size.
        seed (`int`): Seed of its initial parameters.
        train_nll (`float`): Mean negative log-likelihood of the training latents, in nats per latent.
        held_out_nll (`float`): That of the held-out latents.
        iterations (`int`): Iterations of expectation maximisation.
        converged (`bool`): Whether they ended by the tolerance.
        seconds (`float`): Time for initial parameters and iterations.
        device (`str`): Where they were computed.
    """

    num_components: int
    seed: int
    train_nll: float
    held_out_nll: float
    iterations: int
    converged: bool
    seconds: float
    device: str


@dataclass(frozen=True, kw_only=True)
class MixtureCurve:
    """
    The result of [`mixture_curve`].

    Args:
        settings ([`MixtureSettings`]): How the mixtures were fitted.
        data ([`MixtureData`]): What they were fitted to.
        cells (`tuple[MixtureCell, ...]`): The mixtures, by size and then by seed.
    """

    settings: MixtureSettings
    data: MixtureData
    cells: tuple[MixtureCell, ...]

    def held_out_nll(self) -> dict[int, float]:
        """Mean over the seeds of the held-out negative log-likelihood, in nats per latent, by size."""
        sizes = {cell.num_components for cell in self.cells}
        values = {size: [cell.held_out_nll for cell in self.cells if cell.num_components == size] for size in sizes}
        return {size: sum(values[size]) / len(values[size]) for size in sorted(sizes)}

    def best_size(self) -> int:
        """The size of the smallest mean held-out negative log-likelihood."""
        values = self.held_out_nll()
        return min(values, key=values.__getitem__)

    def to_dict(self) -> dict[str, Any]:
        """The curve in plain types, for JSON."""
        return asdict(self)


def mixture_curve(
    train: Rows,
    held_out: Rows,
    sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    settings: MixtureSettings = MixtureSettings(),
    principal: PrincipalComponents | None = None,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> MixtureCurve:
    """
    Fit mixtures of several sizes and seeds to standardised principal components of latents.

    Args:
        train (`torch.Tensor`, `Iterable` or `Callable`): Training latents of shape `(num_images, ...)`, or chunks of
            them, see [`iterate_rows`].
        held_out (`torch.Tensor`, `Iterable` or `Callable`): Latents of other images.
        sizes (`Sequence[int]`): Numbers of components; the paper's are 50 to 300.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`): Seeds of the initial parameters.
        settings ([`MixtureSettings`], *optional*): How to fit.
        principal ([`PrincipalComponents`], *optional*): Those of the training latents on which to project, for the
            same number of them with every tokenizer; by default as many as exceed `settings.variance`.
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the latents, or the principal
            components, are.
        folder (`str` or `Path`, *optional*): Where each mixture's numbers are written as JSON when it is done, and
            found when the same is computed again. The reduced latents lie there in float32 meanwhile, instead of in
            memory.

    Returns:
        [`MixtureCurve`]: The numbers.

    Raises:
        ValueError: If the folder has mixtures of other latents or settings, sizes or seeds are missing or repeated,
            there are fewer training latents than components, or [`fit_principal_components`], [`draw_mixture`] or
            [`fit_mixture`] refuse what they are given.
    """
    for name, values in (("sizes", sizes), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"`{name}` must be at least one number, and none of them twice, got {list(values)}.")
    if principal is None:
        principal = fit_principal_components(train, settings.variance, device=device)
    elif device is not None:
        principal = principal.to(device)
    if not 1 <= min(sizes) <= max(sizes) <= principal.count:
        raise ValueError(
            f"`sizes` must lie in [1, {principal.count}], the number of training latents, got {list(sizes)}."
        )
    if folder is None:
        return _curve(train, held_out, sizes, seeds, settings, principal, None, None)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="reduced-", dir=folder) as scratch:
        return _curve(train, held_out, sizes, seeds, settings, principal, folder, Path(scratch))


def _curve(
    train: Rows,
    held_out: Rows,
    sizes: Sequence[int],
    seeds: Sequence[int],
    settings: MixtureSettings,
    principal: PrincipalComponents,
    folder: Path | None,
    scratch: Path | None,
) -> MixtureCurve:
    device = principal.mean.device
    train = _reduced(train, principal, "train", scratch)
    held_out = _reduced(held_out, principal, "held_out", scratch)
    data = _describe(train, held_out, principal)
    cells = []
    for size in sorted(sizes):
        for seed in sorted(seeds):
            file = None if folder is None else folder / f"components_{size:04d}_seed_{seed}.json"
            cell = None if file is None else _read(file, settings, data)
            if cell is None:
                cell = _fit(train, held_out, size, seed, settings, device)
                if file is not None:
                    write_json(file, {"settings": asdict(settings), "data": asdict(data), "cell": asdict(cell)})
            cells.append(cell)
    return MixtureCurve(settings=settings, data=data, cells=tuple(cells))


def _fit(
    train: torch.Tensor, held_out: torch.Tensor, size: int, seed: int, settings: MixtureSettings, device: torch.device
) -> MixtureCell:
    start = time.perf_counter()
    initial = draw_mixture(
        train,
        size,
        covariance=settings.covariance,
        initialization=settings.initialization,
        reg_covar=settings.reg_covar,
        seed=seed,
        device=device,
    )
    fit = fit_mixture(
        train,
        initial,
        reg_covar=settings.reg_covar,
        tolerance=settings.tolerance,
        max_iterations=settings.max_iterations,
    )
    seconds = time.perf_counter() - start
    cell = MixtureCell(
        num_components=size,
        seed=seed,
        train_nll=-fit.mixture.score(train),
        held_out_nll=-fit.mixture.score(held_out),
        iterations=fit.iterations,
        converged=fit.converged,
        seconds=seconds,
        device=device.type,
    )
    logger.info(
        "%d components, seed %d: held-out NLL %.4f, train NLL %.4f, %d iterations in %.1f s.",
        *(size, seed, cell.held_out_nll, cell.train_nll, cell.iterations, seconds),
    )
    return cell


def _reduced(data: Rows, principal: PrincipalComponents, name: str, scratch: Path | None) -> torch.Tensor:
    """Standardised principal components in float32 on the CPU, in memory or mapped from a file."""
    width = len(principal.components)
    parts, count = [], 0
    stream = None if scratch is None else open(scratch / name, "wb")
    try:
        for rows in iterate_rows(data, principal.mean.device, name=name):
            part = principal.project(rows).to("cpu", torch.float32)
            count += len(part)
            if stream is None:
                parts.append(part)
            else:
                stream.write(part.numpy().tobytes())
    finally:
        if stream is not None:
            stream.close()
    if count == 0:
        raise ValueError(f"`{name}` has no samples.")
    if scratch is None:
        return torch.cat(parts)
    size = count * width
    return torch.from_file(str(scratch / name), shared=False, size=size, dtype=torch.float32).view(count, width)


def _describe(train: torch.Tensor, held_out: torch.Tensor, principal: PrincipalComponents) -> MixtureData:
    zeros = torch.zeros_like(principal.components[:, 0])
    gaussian = GaussianMixture(
        weights=torch.ones_like(zeros[:1]), means=zeros[None], covariances=torch.ones_like(zeros)[None]
    )
    return MixtureData(
        num_train=principal.count,
        num_held_out=len(held_out),
        num_features=len(principal.mean),
        num_dimensions=len(principal.components),
        total_variance=principal.variances.sum().item(),
        explained_variance=principal.explained_variance,
        effective_rank=principal.effective_rank,
        gaussian_train_nll=-gaussian.score(train),
        gaussian_held_out_nll=-gaussian.score(held_out),
    )


def _read(file: Path, settings: MixtureSettings, data: MixtureData) -> MixtureCell | None:
    """A mixture computed before, from the same data with the same settings."""
    if not file.exists():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    for name, value in {**asdict(settings), **asdict(data)}.items():
        found = {**content["settings"], **content["data"]}.get(name)
        same = math.isclose(found, value, rel_tol=_SAME) if isinstance(found, float) else found == value
        if not same:
            raise ValueError(
                f"{file} is of other latents or settings ({name}: {found} instead of {value}): give another `folder`, "
                "or remove it."
            )
    return MixtureCell(**{field.name: content["cell"][field.name] for field in fields(MixtureCell)})
