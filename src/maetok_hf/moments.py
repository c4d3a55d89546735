"""Count, mean and scatter of numbers that come in batches: the one place where moments are accumulated."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class RunningMoments:
    """
    Count, mean and scatter of rows in float64, exact for any division of the rows into batches and processes (Chan,
    Golub and LeVeque, 1979: the statistics of two sets from those of each). Begin with [`~RunningMoments.zeros`].

    On several processes each adds its own rows, and the states of all are merged:

    ```python
    states = accelerator.gather(moments.state()[None].to(accelerator.device))
    moments = RunningMoments.merged(states)
    ```

    Args:
        count (`int`): Number of rows.
        mean (`torch.Tensor` of shape `(num_features,)`): Their mean.
        scatter (`torch.Tensor` of shape `(num_features, num_features)` or `(num_features,)`): Sum of products of
            differences from the mean, or only its diagonal, the sum of squares; exactly 0 for a constant feature.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def zeros(
        cls, num_features: int, *, diagonal: bool = False, device: torch.device | str | None = None
    ) -> "RunningMoments":
        """
        The moments of no rows.

        Args:
            num_features (`int`): Length of a row.
            diagonal (`bool`, *optional*, defaults to `False`): Keep only the diagonal of the scatter.
            device (`torch.device` or `str`, *optional*): Where to compute; it must have float64.
        """
        shape = (num_features,) if diagonal else (num_features, num_features)
        options = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(num_features, **options), torch.zeros(shape, **options))

    @property
    def variance(self) -> torch.Tensor:
        """Mean squared difference of each feature from its mean, of shape `(num_features,)`."""
        return (self.scatter if self.scatter.ndim == 1 else self.scatter.diagonal()) / self.count

    @torch.no_grad()
    def update(self, rows: torch.Tensor) -> None:
        """
        Add rows.

        Args:
            rows (`torch.Tensor` of shape `(num_rows, num_features)`): On any device and of any floating-point type;
                they stay as they are.

        Raises:
            ValueError: If the rows have another number of features.
        """
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise ValueError(f"`rows` must have shape (num_rows, {len(self.mean)}), got {tuple(rows.shape)}.")
        if len(rows) == 0:
            return
        # Differences from a row keep the digits of a small spread around a large mean, and are 0 for a constant.
        origin = rows[0].to(self.mean)
        difference = rows.to(self.mean) - origin
        mean = difference.mean(dim=0)
        difference -= mean
        if self.scatter.ndim == 1:
            self.scatter += difference.square().sum(dim=0)
        else:
            self.scatter.addmm_(difference.T, difference)
        self._shift(len(rows), origin + mean)

    def merge(self, other: "RunningMoments") -> None:
        """
        Add the rows that other moments are of.

        Args:
            other ([`RunningMoments`]): Moments of the same kind, which stay as they are.

        Raises:
            ValueError: If they are of another number of features or another kind.
        """
        if other.scatter.shape != self.scatter.shape:
            raise ValueError(
                f"Moments with a scatter of shape {tuple(other.scatter.shape)} cannot be merged into some of shape "
                f"{tuple(self.scatter.shape)}."
            )
        if other.count:
            self.scatter += other.scatter.to(self.scatter)
            self._shift(other.count, other.mean.to(self.mean))

    def _shift(self, count: int, mean: torch.Tensor) -> None:
        """Count rows whose scatter around their own `mean` is already added."""
        total = self.count + count
        difference = mean - self.mean if self.count else torch.zeros_like(mean)
        factor = self.count * count / total
        if self.scatter.ndim == 1:
            self.scatter += difference.square() * factor
        else:
            self.scatter.addr_(difference, difference, alpha=factor)
        self.mean = self.mean + difference * (count / total) if self.count else mean.clone()
        self.count = total

    def state(self) -> torch.Tensor:
        """All of it as one float64 tensor of shape `(2 + num_features, num_features)`, or `(3, num_features)` with a
        diagonal scatter, to be gathered over processes."""
        count = torch.full_like(self.mean, self.count)
        return torch.cat([count[None], self.mean[None], self.scatter.reshape(-1, len(self.mean))])

    @classmethod
    def merged(cls, states: Iterable[torch.Tensor], *, diagonal: bool = False) -> "RunningMoments":
        """
        The moments of several sets together, where the first state is.

        Args:
            states (`Iterable[torch.Tensor]`): What [`~RunningMoments.state`] of each gave; at least one.
            diagonal (`bool`, *optional*, defaults to `False`): Whether they are of diagonal scatters.

        Raises:
            ValueError: If there are no states, or they are not of one kind.
        """
        merged = None
        for state in states:
            scatter = state[2] if diagonal and len(state) == 3 else state[2:]
            merged = merged or cls.zeros(state.shape[1], diagonal=diagonal, device=state.device)
            merged.merge(cls(int(state[0, 0]), state[1], scatter))
        if merged is None:
            raise ValueError("`states` must be at least one.")
        return merged
