"""Steps that are taken only if they are finite, decided on the device."""

from collections.abc import Iterable, Sequence

import torch


class StepGuard:
    """
    Skips optimisation steps whose loss or gradient is not finite, counts them, and says when there are too many.

    The decision stays on the device: fused AdamW leaves its parameters and its state alone where `found_inf` is set,
    as a gradient scaler sets it, so the host need not wait for every step. The counts are read only now and then.

    Args:
        optimizers (`Sequence[torch.optim.Optimizer]`): Fused optimisers, not wrapped. Leave out those that a gradient
            scaler (fp16) serves: it decides about their steps, and the guard then only counts.
        max_consecutive (`int`): Skipped steps in a row after which [`~StepGuard.exhausted`] is true.
        device (`torch.device`): Device of the gradients.

    Raises:
        ValueError: If `max_consecutive` is not positive or an optimiser is not fused.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], max_consecutive: int, device: torch.device):
        if max_consecutive < 1:
            raise ValueError(f"`max_consecutive` must be at least 1, got {max_consecutive}.")
        for optimizer in optimizers:
            if not optimizer.defaults.get("fused"):
                raise ValueError(f"`optimizers` must be fused, got {type(optimizer).__name__} without `fused=True`.")
        self.optimizers = list(optimizers)
        self.max_consecutive = max_consecutive
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # in all, in a row
        self._calls = 0

    @staticmethod
    def expose(loss: torch.Tensor) -> torch.Tensor:
        """
        Make a loss that is not finite give gradients that are not finite: after gradients have been averaged over the
        processes, every one of them then knows, without asking the others.

        Args:
            loss (`torch.Tensor`): Scalar.

        Returns:
            `torch.Tensor`: The same value, or NaN.
        """
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def admit(self, gradient_norms: Iterable[torch.Tensor]) -> torch.Tensor:
        """
        Decide on a step; call it between clipping and the optimisers' steps.

        Args:
            gradient_norms (`Iterable[torch.Tensor]`): Norms of the gradients of all optimisers. One that is not finite
                stops the steps of all of them, so that a generator and its discriminator stay together.

        Returns:
            `torch.Tensor`: Bool scalar on the device: whether the step is taken.
        """
        finite = torch.stack([norm.detach().float().isfinite() for norm in gradient_norms]).all()
        skipped = (~finite).to(torch.int64)
        self._counts = torch.stack([self._counts[0] + skipped, (self._counts[1] + 1) * skipped])
        self._calls += 1
        for optimizer in self.optimizers:
            optimizer.found_inf = skipped.to(torch.float32)
        return finite

    def exhausted(self) -> bool:
        """
        Whether at least `max_consecutive` steps in a row were skipped. It reads the device only once in
        `max_consecutive` calls of [`~StepGuard.admit`], so twice as many may have been by then.
        """
        if self._calls < self.max_consecutive:
            return False
        self._calls = 0
        return int(self._counts[1]) >= self.max_consecutive

    @property
    def num_skipped(self) -> int:
        """`int`: Steps skipped in the whole run; reading it waits for the device."""
        return int(self._counts[0])

    def load(self, num_skipped: int) -> None:
        """Continue the count of an earlier run; the steps in a row begin at 0 again."""
        self._counts = torch.tensor([num_skipped, 0], device=self._counts.device)
