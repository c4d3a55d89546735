"""Mixtures of Gaussians fitted by exact expectation maximisation to more latents than fit into memory.

MAETok counts the modes of a latent space by the negative log-likelihood of Gaussian mixtures. With weights w_k that
are not negative and sum to 1, means m_k and covariances C_k, diagonal or full,

    log p(x) = log sum_k w_k N(x; m_k, C_k)

An iteration needs of the data only sums over the samples, so going through them in chunks gives the result of all of
them at once. It is the iteration of scikit-learn's `GaussianMixture`, from the same parameters to the same parameters.
All is computed in float64.
"""

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from ..moments import RunningMoments
from ..seeding import keyed_generator
from .rows import Rows, iterate_rows, moments_of


logger = logging.getLogger(__name__)

CovarianceType = Literal["diag", "full"]
Initialization = Literal["kmeans++", "random"]

# samples among which the first means are drawn, and among which at least this many for each of them
_DRAWN_FROM = 2**14
_DRAWN_FROM_PER_COMPONENT = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianMixture:
    """
    A density, from [`draw_mixture`], [`fit_mixture`] or parameters of your own.

    Args:
        weights (`torch.Tensor` of shape `(num_components,)`): Not negative, of sum 1; float64, like all parameters.
        means (`torch.Tensor` of shape `(num_components, num_features)`): Means of the components.
        covariances (`torch.Tensor` of shape `(num_components, num_features)` or
            `(num_components, num_features, num_features)`): Variances of the components, or their covariance matrices.

    Raises:
        ValueError: If shapes, types or devices do not fit each other, the weights are not normalised, a parameter is
            not finite or a covariance not positive definite.
    """

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    def __post_init__(self):
        parameters = {"weights": self.weights, "means": self.means, "covariances": self.covariances}
        size, width = self.means.shape if self.means.ndim == 2 else (0, 0)
        if (
            size == 0
            or self.weights.shape != (size,)
            or self.covariances.shape not in ((size, width), (size, width, width))
        ):
            shapes = {name: tuple(value.shape) for name, value in parameters.items()}
            raise ValueError(
                "A mixture needs `weights` of shape (components,), `means` (components, features) and `covariances` "
                f"(components, features) or (components, features, features), got {shapes}."
            )
        for name, value in parameters.items():
            if value.dtype != torch.float64 or value.device != self.means.device or not value.isfinite().all():
                raise ValueError(
                    f"`{name}` must be finite numbers in torch.float64 on the device of the means, "
                    f"{self.means.device}, got {value.dtype} on {value.device}."
                )
        if (self.weights < 0).any() or abs(self.weights.sum().item() - 1) > 1e-6:
            raise ValueError(
                f"`weights` must not be negative and sum to 1, got a sum of {self.weights.sum().item()} and a "
                f"smallest one of {self.weights.min().item()}."
            )
        broken = (self._deviations <= 0).any(dim=1).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"The covariances of components {broken} are not positive definite: raise `reg_covar`, or take fewer "
                "components."
            )

    @property
    def is_full(self) -> bool:
        """Whether the covariances are matrices."""
        return self.covariances.ndim == 3

    @cached_property
    def _factors(self) -> torch.Tensor:
        """Lower triangular roots of the covariance matrices; the diagonal of one that has none holds a 0."""
        factors, info = torch.linalg.cholesky_ex(self.covariances)
        return torch.where((info == 0)[:, None, None], factors, 0.0)

    @cached_property
    def _deviations(self) -> torch.Tensor:
        """Numbers whose product for a component is the root of the determinant of its covariance."""
        return self._factors.diagonal(dim1=1, dim2=2) if self.is_full else self.covariances.clamp(min=0).sqrt()

    @cached_property
    def _whitening(self) -> torch.Tensor:
        """Matrices that map a difference from the mean, as a row, to independent numbers of variance 1."""
        eye = torch.eye(self.means.shape[1], dtype=torch.float64, device=self.means.device)
        return torch.linalg.solve_triangular(self._factors, eye.expand_as(self.covariances), upper=False).mT

    @property
    def _centre(self) -> torch.Tensor:
        """Mean of the density. Differences from it lose fewer digits than the numbers themselves."""
        return self.weights @ self.means

    def joint_log_prob(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Log of the share that each component has in the density.

        Args:
            rows (`torch.Tensor` of shape `(num_rows, num_features)`): Samples.

        Returns:
            `torch.Tensor` of shape `(num_rows, num_components)`: `log(w_k N(x; m_k, C_k))` in float64, whose softmax
                over the components is the probability of each.

        Raises:
            ValueError: If the rows have another number of features.
        """
        size, width = self.means.shape
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"`rows` must have shape (num_rows, {width}), got {tuple(rows.shape)}.")
        rows = rows.to(self.means)
        if self.is_full:
            distances = torch.stack(
                [
                    ((rows - mean) @ whitening).square().sum(dim=1)
                    for mean, whitening in zip(self.means, self._whitening, strict=True)
                ],
                dim=1,
            )
        else:
            difference, means, precisions = rows - self._centre, self.means - self._centre, 1 / self.covariances
            distances = (means.square() * precisions).sum(dim=1) - 2 * difference @ (means * precisions).T
            distances.addmm_(difference.square(), precisions.T)
        constants = self.weights.log() - self._deviations.log().sum(dim=1) - width / 2 * math.log(2 * math.pi)
        return constants - distances / 2

    def log_prob(self, rows: torch.Tensor) -> torch.Tensor:
        """
        Log of the density.

        Args:
            rows (`torch.Tensor` of shape `(num_rows, num_features)`): Samples.

        Returns:
            `torch.Tensor` of shape `(num_rows,)`: In nats, float64.

        Raises:
            ValueError: If the rows have another number of features.
        """
        return self.joint_log_prob(rows).logsumexp(dim=1)

    @torch.no_grad()
    def score(self, data: Rows) -> float:
        """
        Mean log-likelihood of samples; minus that of held-out ones is the number to compare mixtures by.

        Args:
            data (`torch.Tensor`, `Iterable` or `Callable`): Samples, see [`iterate_rows`].

        Returns:
            `float`: In nats per sample.

        Raises:
            ValueError: If there is no sample, or samples have another number of features or are not finite.
        """
        count, total = 0, 0.0
        for rows in iterate_rows(data, self.means.device, width=len(self.weights)):
            count += len(rows)
            total += self.log_prob(rows).sum().item()
        if count == 0:
            raise ValueError("`data` has no samples.")
        return total / count


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureFit:
    """
    What [`fit_mixture`] reached.

    Args:
        mixture ([`GaussianMixture`]): The mixture after the last iteration.
        log_likelihoods (`tuple[float, ...]`): Mean log-likelihood of the training samples before each iteration.
        converged (`bool`): Whether it changed by less than the tolerance at last.
    """

    mixture: GaussianMixture
    log_likelihoods: tuple[float, ...]
    converged: bool

    @property
    def iterations(self) -> int:
        """Number of iterations, each of which was one pass over the data."""
        return len(self.log_likelihoods)


class _Sums:
    """
    Sums over the samples that the next parameters are made of, of differences from what the mixture knows: its centre,
    or for matrices, where each component has its own products anyway, the mean of each component. `variance` is that
    of the data.
    """

    def __init__(self, mixture: GaussianMixture, variance: torch.Tensor):
        self.is_full = mixture.is_full
        self.means = mixture.means
        self.variance = variance
        self.reference = mixture.means if mixture.is_full else mixture._centre
        self.counts = torch.zeros_like(mixture.weights)
        self.first = torch.zeros_like(mixture.means)
        self.second = torch.zeros_like(mixture.covariances)

    def add(self, rows: torch.Tensor, responsibilities: torch.Tensor) -> None:
        self.counts += responsibilities.sum(dim=0)
        if not self.is_full:
            difference = rows - self.reference
            self.first.addmm_(responsibilities.T, difference)
            self.second.addmm_(responsibilities.T, difference.square())
            return
        for k, mean in enumerate(self.reference):
            difference = rows - mean
            weighted = responsibilities[:, k, None] * difference
            self.first[k] += weighted.sum(dim=0)
            self.second[k].addmm_(weighted.T, difference)

    def maximize(self, reg_covar: float) -> GaussianMixture:
        # scikit-learn adds as much to the counts; here a component without samples keeps its mean
        few = 10 * torch.finfo(torch.float64).eps
        counts = self.counts + few
        shift = (self.first + few * (self.means - self.reference)) / counts[:, None]
        if self.is_full:
            second = self.second / counts[:, None, None]
            covariances = second - shift[:, :, None] * shift[:, None, :]
            covariances = (covariances + covariances.mT) / 2
            self._regularize(covariances.diagonal(dim1=1, dim2=2), second.diagonal(dim1=1, dim2=2), reg_covar)
        else:
            second = self.second / counts[:, None]
            covariances = second - shift.square()
            self._regularize(covariances, second, reg_covar)
        return GaussianMixture(weights=counts / counts.sum(), means=self.reference + shift, covariances=covariances)

    def _regularize(self, variances: torch.Tensor, second: torch.Tensor, reg_covar: float) -> None:
        """In place. Variances that are only rounding errors are 0, so that a component that collapses is noticed."""
        limit = 100 * torch.finfo(torch.float64).eps * (second + self.variance)
        variances.masked_fill_(variances <= limit, 0.0).add_(reg_covar)


@torch.no_grad()
def fit_mixture(
    data: Rows,
    initial: GaussianMixture,
    *,
    reg_covar: float = 1e-6,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
) -> MixtureFit:
    """
    Expectation maximisation from given parameters. The initial mixture decides how many components there are, whether
    their covariances are diagonal, and where to compute.

    Args:
        data (`torch.Tensor`, `Iterable` or `Callable`): Training samples, see [`iterate_rows`]. Each iteration is one
            pass; the result does not depend on the chunks.
        initial ([`GaussianMixture`]): Where to start.
        reg_covar (`float`, *optional*, defaults to 1e-6): Added to all variances at each iteration.
        tolerance (`float`, *optional*, defaults to 1e-3): Stop when the mean log-likelihood changes by less, in nats;
            0 never does.
        max_iterations (`int`, *optional*, defaults to 100): Stop there, with a warning if the tolerance is above 0.

    Returns:
        [`MixtureFit`]: The mixture, and how it got there.

    Raises:
        ValueError: If there are fewer samples than components, a feature is constant while `reg_covar` is 0, a
            component collapses, samples do not fit the mixture or change from pass to pass, or a setting is out of
            range.
    """
    if not (reg_covar >= 0 and tolerance >= 0):
        raise ValueError(f"`reg_covar` and `tolerance` must not be negative, got {reg_covar} and {tolerance}.")
    if max_iterations < 1:
        raise ValueError(f"`max_iterations` must be at least 1, got {max_iterations}.")
    moments = _checked_moments(data, len(initial.weights), reg_covar, initial.means.device)
    mixture, log_likelihoods, converged = initial, [], False
    while not converged and len(log_likelihoods) < max_iterations:
        sums, count, total = _Sums(mixture, moments.variance), 0, 0.0
        for rows in iterate_rows(data, mixture.means.device, width=len(mixture.weights)):
            joint = mixture.joint_log_prob(rows)
            log_prob = joint.logsumexp(dim=1, keepdim=True)
            sums.add(rows, joint.sub_(log_prob).exp_())
            count += len(rows)
            total += log_prob.sum().item()
        if count != moments.count:
            raise ValueError(f"`data` had {moments.count} samples in the first pass and {count} in a later one.")
        mixture = sums.maximize(reg_covar)
        log_likelihoods.append(total / count)
        converged = len(log_likelihoods) > 1 and abs(log_likelihoods[-1] - log_likelihoods[-2]) < tolerance
    if tolerance > 0 and not converged:
        logger.warning(
            "The mixture of %d components has not converged after %d iterations: raise `max_iterations` or "
            "`tolerance`.",
            *(len(mixture.weights), max_iterations),
        )
    return MixtureFit(mixture=mixture, log_likelihoods=tuple(log_likelihoods), converged=converged)


@torch.no_grad()
def draw_mixture(
    data: Rows,
    num_components: int,
    *,
    covariance: CovarianceType = "diag",
    initialization: Initialization = "kmeans++",
    reg_covar: float = 1e-6,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> GaussianMixture:
    """
    A mixture to start from.

    `"kmeans++"` draws the means among samples, each one likelier the farther it is from those before (Arthur and
    Vassilvitskii, 2007, the best of several candidates each time); weights are the shares of the samples that are
    nearest to each mean, and all components have the mean variance within these. To be one pass over the data, it
    considers at most 16384 samples, or 32 for each component. `"random"` draws to which degree each sample belongs to
    each component, uniformly; of many samples, all components are then nearly the same, and it takes many iterations
    before they part.

    Args:
        data (`torch.Tensor`, `Iterable` or `Callable`): Training samples, see [`iterate_rows`].
        num_components (`int`): Number of components.
        covariance (`str`, *optional*, defaults to `"diag"`): `"diag"` or `"full"`. All of `"full"` are
            `num_components` x `num_features` x `num_features` numbers.
        initialization (`str`, *optional*, defaults to `"kmeans++"`): `"kmeans++"` or `"random"`.
        reg_covar (`float`, *optional*, defaults to 1e-6): Added to all variances.
        seed (`int`, *optional*, defaults to 0): Key of all draws, together with the number of components.
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the data is.

    Returns:
        [`GaussianMixture`]: The mixture, which does not depend on the chunks of the data.

    Raises:
        ValueError: If there are fewer samples than components, or fewer different ones, a feature is constant while
            `reg_covar` is 0, or a setting is out of range.
    """
    if covariance not in ("diag", "full"):
        raise ValueError(f"`covariance` must be 'diag' or 'full', got {covariance!r}.")
    if initialization not in ("kmeans++", "random"):
        raise ValueError(f"`initialization` must be 'kmeans++' or 'random', got {initialization!r}.")
    if num_components < 1:
        raise ValueError(f"`num_components` must be at least 1, got {num_components}.")
    if not reg_covar >= 0:
        raise ValueError(f"`reg_covar` must not be negative, got {reg_covar}.")
    moments = _checked_moments(data, num_components, reg_covar, device)
    if initialization == "random":
        return _random_mixture(data, num_components, covariance, reg_covar, seed, moments)
    size = max(_DRAWN_FROM, _DRAWN_FROM_PER_COMPONENT * num_components)
    generator = keyed_generator(seed, "mixture_samples", num_components)
    indices = torch.randperm(moments.count, generator=generator)[:size].sort().values
    rows = _gather(data, indices, moments.mean.device)
    means = rows[_spread_rows(rows, num_components, keyed_generator(seed, "mixture_means", num_components))]
    nearest = _squared_distances(rows, means).argmin(dim=1)
    within = (rows - means[nearest]).square().mean(dim=0)
    variances = torch.where(within > 0, within, moments.variance) + reg_covar
    return GaussianMixture(
        weights=nearest.bincount(minlength=num_components).double() / len(rows),
        means=means,
        covariances=_repeated(variances, num_components, covariance),
    )


def _random_mixture(
    data: Rows, num_components: int, covariance: CovarianceType, reg_covar: float, seed: int, moments: RunningMoments
) -> GaussianMixture:
    same = GaussianMixture(
        weights=torch.full_like(moments.mean[:1], 1 / num_components).repeat(num_components),
        means=moments.mean.repeat(num_components, 1),
        covariances=_repeated(moments.variance + reg_covar, num_components, covariance),
    )
    sums = _Sums(same, moments.variance)
    generator = keyed_generator(seed, "mixture_responsibilities", num_components)
    for rows in iterate_rows(data, moments.mean.device, width=num_components):
        draws = torch.rand(len(rows), num_components, dtype=torch.float64, generator=generator)
        sums.add(rows, (draws / draws.sum(dim=1, keepdim=True)).to(rows.device))
    return sums.maximize(reg_covar)


def _repeated(variances: torch.Tensor, num_components: int, covariance: CovarianceType) -> torch.Tensor:
    """The same variances for all components."""
    return torch.stack([variances if covariance == "diag" else variances.diag()] * num_components)


def _checked_moments(
    data: Rows, num_components: int, reg_covar: float, device: torch.device | str | None
) -> RunningMoments:
    moments = moments_of(data, device, diagonal=True)
    if moments.count < num_components:
        raise ValueError(f"`data` has {moments.count} samples, fewer than the {num_components} components.")
    constant = (moments.scatter == 0).nonzero().flatten().tolist()
    if constant and reg_covar == 0:
        raise ValueError(
            f"Features {constant[:10]} of `data` are constant, where a density has no bound: leave them out, or set "
            "`reg_covar` above 0."
        )
    return moments


def _gather(data: Rows, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Samples with the given indices, in increasing order."""
    parts, start = [], 0
    for rows in iterate_rows(data):
        inside = indices[(indices >= start) & (indices < start + len(rows))] - start
        parts.append(rows[inside.to(rows.device)].to(device))
        start += len(rows)
    return torch.cat(parts)


def _spread_rows(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of rows that k-means++ draws as the first centres."""
    num_candidates = 2 + int(math.log(count))
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = _squared_distances(rows, rows[chosen])[:, 0]
    while len(chosen) < count:
        cumulated = nearest.cpu().cumsum(dim=0)
        if cumulated[-1] == 0:
            raise ValueError(
                f"`data` has {len(chosen)} different samples among those that the means are drawn from, fewer than "
                f"the {count} components."
            )
        draws = torch.rand(num_candidates, dtype=torch.float64, generator=generator) * cumulated[-1]
        candidates = torch.searchsorted(cumulated, draws, right=True).clamp(max=len(rows) - 1).to(rows.device)
        distances = torch.minimum(nearest[:, None], _squared_distances(rows, rows[candidates]))
        best = distances.sum(dim=0).argmin()
        nearest = distances[:, best]
        chosen.append(int(candidates[best]))
    return torch.tensor(chosen, device=rows.device)


def _squared_distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    # by differences, of which that of a row from itself is exactly 0
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist").square()
