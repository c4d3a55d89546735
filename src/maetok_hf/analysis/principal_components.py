"""Principal components of flattened latents, from their covariance in float64.

The covariance of all training latents is summed over chunks, so that memory depends on the number of features and not
on that of the images: several matrices of 134 MB for the 4096 features of 128 tokens of 32 channels.
"""

from dataclasses import dataclass

import torch

from ..moments import RunningMoments
from .rows import Rows, moments_of
from .spectrum import effective_rank, without_rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class PrincipalComponents:
    """
    The directions of largest variance, from [`fit_principal_components`].

    Args:
        mean (`torch.Tensor` of shape `(num_features,)`): Mean of the training latents, float64.
        components (`torch.Tensor` of shape `(num_components, num_features)`): Orthonormal directions, the one of
            largest variance first, each with the sign that makes its largest entry positive.
        variances (`torch.Tensor` of shape `(num_features,)`): Variance of the training latents along all directions,
            also those that are not among the components, from the largest to the smallest; 0 where rounding does not
            tell it from 0.
        count (`int`): Number of training latents.
    """

    mean: torch.Tensor
    components: torch.Tensor
    variances: torch.Tensor
    count: int

    @property
    def explained_variance(self) -> float:
        """Fraction of the variance of the training latents that lies along the components."""
        return (self.variances[: len(self.components)].sum() / self.variances.sum()).item()

    @property
    def effective_rank(self) -> float:
        """Effective rank of the training latents minus their mean, see [`effective_rank`]."""
        return effective_rank(self.variances.sqrt())

    def to(self, device: torch.device | str) -> "PrincipalComponents":
        """
        The same on a device.

        Args:
            device (`torch.device` or `str`): It must have float64.

        Returns:
            [`PrincipalComponents`]: The components there.
        """
        return PrincipalComponents(
            mean=self.mean.to(device),
            components=self.components.to(device),
            variances=self.variances.to(device),
            count=self.count,
        )

    def project(self, latents: torch.Tensor, standardize: bool = True) -> torch.Tensor:
        """
        Coordinates of latents along the components.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, ...)`): Latents, flattened from the second dimension on.
            standardize (`bool`, *optional*, defaults to `True`): Divide each coordinate by its standard deviation over
                the training latents, where its mean is 0 in any case.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_components)`: In float64.

        Raises:
            ValueError: If the latents have another number of features than those of the training.
        """
        rows = latents.flatten(1)
        if rows.shape[1] != len(self.mean):
            raise ValueError(
                f"`latents` have {rows.shape[1]} features, but the components were fitted to {len(self.mean)}."
            )
        coordinates = (rows.to(self.mean) - self.mean) @ self.components.T
        return coordinates / self.variances[: len(self.components)].sqrt() if standardize else coordinates


def fit_principal_components(
    latents: Rows | RunningMoments,
    variance: float = 0.9,
    num_components: int | None = None,
    device: torch.device | str | None = None,
) -> PrincipalComponents:
    """
    The smallest number of principal components that hold more than a fraction of the variance.

    Args:
        latents (`torch.Tensor`, `Iterable`, `Callable` or [`RunningMoments`]): Training latents, see [`iterate_rows`];
            or their moments, for example those of several processes merged.
        variance (`float`, *optional*, defaults to 0.9): The fraction that they must exceed.
        num_components (`int`, *optional*): As many components instead, at most those of a variance above 0.
        device (`torch.device` or `str`, *optional*): Where to compute; by default where the latents are.

    Returns:
        [`PrincipalComponents`]: The components.

    Raises:
        ValueError: If `variance` is not in (0, 1), there are fewer than two latents, all are the same, there are fewer
            components than wanted, the moments are without the whole scatter, or [`iterate_rows`] refuses the latents.
    """
    if not 0 < variance < 1:
        raise ValueError(f"`variance` must lie in (0, 1), got {variance}.")
    moments = latents if isinstance(latents, RunningMoments) else moments_of(latents, device, name="latents")
    if moments.scatter.ndim != 2:
        raise ValueError("`latents` are moments of single features: make them with `diagonal=False`.")
    if moments.count < 2 or not moments.variance.any():
        raise ValueError(f"`latents` must be different ones, got {moments.count} without any variance.")
    values, vectors = torch.linalg.eigh(moments.scatter / moments.count)
    values, vectors = without_rounding(values.flip(0)), vectors.T.flip(0)
    positive = int((values > 0).sum())
    if num_components is None:
        fractions = values.cumsum(dim=0) / values.sum()
        num_components = min(int((fractions <= variance).sum()) + 1, positive)
    if not 1 <= num_components <= positive:
        raise ValueError(
            f"`num_components` must lie in [1, {positive}], the number of directions with a variance above 0, got "
            f"{num_components}."
        )
    components = vectors[:num_components]
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    return PrincipalComponents(
        mean=moments.mean, components=components * largest.sign(), variances=values, count=moments.count
    )
