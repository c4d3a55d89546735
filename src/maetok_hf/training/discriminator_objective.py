"""The discriminator's objective, and the adversarial term of the tokenizer's (MAETok, arXiv 2502.03444)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .adversarial import check_loss_type, consistency_loss, discriminator_loss, generator_loss, lecam_regularization
from .diffaugment import (
    DIFFAUGMENT_POLICIES,
    check_policy,
    diffaugment,
    sample_diffaugment_draws,
    sample_uniform,
)
from .discriminator import Discriminator


def sample_adversarial_draws(
    seed: int,
    purpose: str,
    step: int,
    sample_indices: Sequence[int] | torch.Tensor,
    looks: Sequence[str] = ("real", "fake", "real_again", "fake_again"),
) -> dict[str, torch.Tensor]:
    """
    Everything random in one call of [`DiscriminatorObjective`] or of its `generator_loss`, keyed per image. The
    draws do not depend on what is switched on.

    Args:
        seed (`int`): Seed of the run.
        purpose (`str`): Name of the draw, for example `"discriminator"` and `"generator"`, which are independent.
        step (`int`): Optimiser step of the draw.
        sample_indices (`Sequence[int]` or integer `torch.Tensor` of shape `(batch_size,)`):
            Global index of each image of the batch.
        looks (`Sequence[str]`, *optional*): Those that are needed, all by default; `generator_loss` needs `"fake"`.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU, in `[0, 1)`. `"real"`, `"fake"` and, for the second look of the
        consistency term, `"real_again"`, `"fake_again"`: augmentations, of shape `(batch_size, 10)`. `"real_crop"`,
        `"fake_crop"`: windows, of shape `(batch_size, 2)`, the same for both looks at an image.

    Raises:
        ValueError: If `sample_indices` is empty or not one-dimensional.
        TypeError: If `seed`, `step` or an index is not an integer.
    """
    draws = {name: sample_diffaugment_draws(seed, f"{purpose}_{name}", step, sample_indices) for name in looks}
    for name in dict.fromkeys(f"{look.removesuffix('_again')}_crop" for look in looks):
        draws[name] = sample_uniform(seed, f"{purpose}_{name}", step, sample_indices, 2)
    return draws


class DiscriminatorObjective(nn.Module):
    """
    Loss of a training step of the discriminator. It holds the discriminator's heads, so that preparing and forwarding
    the objective is what synchronises their gradients between processes. It draws nothing itself.

    Terms, returned by name and unweighted:

    - `"discriminator"`: [`~maetok_hf.training.adversarial.discriminator_loss`] of augmented images and augmented
      reconstructions.
    - `"lecam"`: [`~maetok_hf.training.adversarial.lecam_regularization`] towards moving averages of the mean logits; 0
      until they have been updated for the first time.
    - `"consistency"`: [`~maetok_hf.training.adversarial.consistency_loss`] between these logits and those of a second,
      independent augmentation, mean of the two sides; 0, and no second look is taken, if its weight is 0.
    - `"logits_real"`, `"logits_fake"`: mean logits, for the record.

    Differences from what public copies of the released code do: there each augmentation of the first look is applied
    to half of the batches, here to half of the images; `"discriminator"` and `"lecam"` are scaled by the adversarial
    weight while the consistency term is not, which with AdamW amounts to a larger `consistency_weight`; and the moving
    averages begin at 0 and are updated before they are used.

    The moving averages are buffers, and saved. They are updated once per optimiser step, by `end_step`, from all
    logits of the step, so they do not depend on how a step is cut into micro-batches and processes. The first update
    sets them.

    Args:
        discriminator ([`Discriminator`]): The discriminator to train.
        loss (`str`, *optional*, defaults to `"hinge"`): `"hinge"` or `"non_saturating"`, of both sides.
        lecam_weight (`float`, *optional*, defaults to 0.001): Weight of the LeCam term.
        lecam_decay (`float`, *optional*, defaults to 0.999): Decay of the moving averages per optimiser step.
        consistency_weight (`float`, *optional*, defaults to 4.0): Weight of the consistency term.
        diffaugment (`Sequence[str]`, *optional*, defaults to `("color", "translation", "cutout")`): Augmentations of
            all that the discriminator sees, see [`~maetok_hf.training.diffaugment.diffaugment`]; empty for none.
        diffaugment_probability (`float`, *optional*, defaults to 0.5): Probability of each augmentation in the first
            look and in `generator_loss`; in the second look it is 1.
        diffaugment_cutout (`float`, *optional*, defaults to 0.2): Sides of the rectangle that `"cutout"` hides there,
            as a fraction of the image's; in the second look it is 0.5.

    Raises:
        ValueError: If a name is unknown, a weight is negative or not finite, the decay is not in `[0, 1)`, a
            probability or fraction not in `[0, 1]`, or consistency is asked for without augmentation.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        loss: str = "hinge",
        lecam_weight: float = 0.001,
        lecam_decay: float = 0.999,
        consistency_weight: float = 4.0,
        diffaugment: Sequence[str] = DIFFAUGMENT_POLICIES,
        diffaugment_probability: float = 0.5,
        diffaugment_cutout: float = 0.2,
    ):
        super().__init__()
        check_loss_type(loss, "loss")
        for name, weight in (("lecam_weight", lecam_weight), ("consistency_weight", consistency_weight)):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"`{name}` must be finite and not negative, got {weight}.")
        if not 0 <= lecam_decay < 1:
            raise ValueError(f"`lecam_decay` must be in [0, 1), got {lecam_decay}.")
        fractions = {"diffaugment_probability": diffaugment_probability, "diffaugment_cutout": diffaugment_cutout}
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
        self.policy = check_policy(diffaugment, "diffaugment")
        if consistency_weight > 0 and not self.policy:
            raise ValueError(
                "`consistency_weight` compares two augmentations of an image but `diffaugment` is empty: name some or "
                "set the weight to 0."
            )
        self.diffaugment_probability = diffaugment_probability
        self.diffaugment_cutout = diffaugment_cutout
        self.discriminator = discriminator
        self.loss_type = loss
        self.lecam_weight = lecam_weight
        self.lecam_decay = lecam_decay
        self.consistency_weight = consistency_weight
        # mean logits of real images and of reconstructions
        self.register_buffer("mean_logits", torch.zeros(2))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))
        # of the running step: not a buffer, which DDP would overwrite with that of the first process
        self._step_sums: torch.Tensor | None = None

    @property
    def looks(self) -> list[str]:
        """`list[str]`: What is judged in a step, as [`sample_adversarial_draws`] names it."""
        return ["real", "fake"] + (["real_again", "fake_again"] if self.consistency_weight > 0 else [])

    def forward(
        self, real: torch.Tensor, fake: torch.Tensor, draws: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """
        Judge images and reconstructions in one pass, and in training mode note their mean logits for `end_step`.

        Args:
            real (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.
            fake (`torch.Tensor` of the same shape): Reconstructions. They are detached: no gradient reaches them.
            draws (`dict[str, torch.Tensor]`): See [`sample_adversarial_draws`].

        Returns:
            `dict[str, torch.Tensor]`: Scalars in float32. `"loss"` carries the gradient; the terms are detached.

        Raises:
            ValueError: If shapes do not fit.
        """
        if real.shape != fake.shape:
            raise ValueError(
                f"`real` has shape {tuple(real.shape)} but `fake` {tuple(fake.shape)}: `fake` must be reconstructions "
                "of `real`."
            )
        logits = dict(zip(self.looks, self._logits(real.detach(), fake.detach(), draws, self.looks), strict=True))
        terms = {
            "discriminator": discriminator_loss(logits["real"], logits["fake"], self.loss_type),
            "lecam": self._lecam(logits["real"], logits["fake"]),
            "consistency": self._consistency(logits),
        }
        if self.training:
            self._note(logits["real"].detach(), logits["fake"].detach())
        loss = (
            terms["discriminator"]
            + self.lecam_weight * terms["lecam"]
            + self.consistency_weight * terms["consistency"]
        )
        terms |= {"logits_real": logits["real"].mean(), "logits_fake": logits["fake"].mean()}
        return {"loss": loss} | {name: term.detach() for name, term in terms.items()}

    def generator_loss(self, fake: torch.Tensor, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Adversarial term of the tokenizer: its reconstructions, augmented, shall be judged real. Gradients flow to
        `fake` only, and nothing of the discriminator changes, see [`Discriminator.judge`]. Call it on the module
        itself, not through DDP.

        Args:
            fake (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Reconstructions.
            draws (`dict[str, torch.Tensor]`): See [`sample_adversarial_draws`]; `"fake"` and `"fake_crop"` are used.

        Returns:
            `torch.FloatTensor`: Scalar.

        Raises:
            ValueError: If shapes do not fit.
        """
        augmented = self._augment(fake, "fake", draws)
        return generator_loss(self.discriminator.judge(augmented, self._crop_draws(draws, ["fake"])), self.loss_type)

    @torch.no_grad()
    def end_step(self, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """
        Update the moving averages with the mean logits of the optimiser step that ends, over all its micro-batches.
        The step is left out if one of them is not finite, and if there was none.

        Args:
            reduce (`Callable[[torch.Tensor], torch.Tensor]`, *optional*):
                Mean (or sum) of a tensor over processes, for example `lambda t: accelerator.reduce(t, "mean")`.
                Processes may hold different numbers of images. Without it, this process is the only one.
        """
        sums, self._step_sums = self._step_sums, None
        if sums is None:
            return
        if reduce is not None:
            sums = reduce(sums)
        mean = sums[:2] / sums[2]
        finite = mean.isfinite().all()
        updated = torch.where(self.num_updates > 0, torch.lerp(mean, self.mean_logits, self.lecam_decay), mean)
        self.mean_logits.copy_(torch.where(finite, updated, self.mean_logits))
        self.num_updates += finite

    def _logits(
        self, real: torch.Tensor, fake: torch.Tensor, draws: dict[str, torch.Tensor], looks: list[str]
    ) -> Sequence[torch.Tensor]:
        """Logits of each look, from a single pass: one power iteration, and the same weights for all."""
        sides = {"real": real, "fake": fake}
        images = [self._augment(sides[look.removesuffix("_again")], look, draws) for look in looks]
        return self.discriminator(torch.cat(images), self._crop_draws(draws, looks)).chunk(len(looks))

    def _augment(self, images: torch.Tensor, look: str, draws: dict[str, torch.Tensor]) -> torch.Tensor:
        if look.endswith("_again"):
            return diffaugment(images, draws[look], self.policy)
        return diffaugment(images, draws[look], self.policy, self.diffaugment_probability, self.diffaugment_cutout)

    def _crop_draws(self, draws: dict[str, torch.Tensor], looks: list[str]) -> torch.Tensor | None:
        if self.discriminator.input_mode != "crop":
            return None
        return torch.cat([draws[f"{look.removesuffix('_again')}_crop"] for look in looks])

    def _lecam(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> torch.Tensor:
        value = lecam_regularization(logits_real, logits_fake, *self.mean_logits)
        return torch.where(self.num_updates > 0, value, 0.0)

    def _consistency(self, logits: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.consistency_weight == 0:
            return logits["real"].new_zeros(())
        return sum(consistency_loss(logits[side], logits[f"{side}_again"]) for side in ("real", "fake")) / 2

    def _note(self, logits_real: torch.Tensor, logits_fake: torch.Tensor) -> None:
        """Add the logits of a micro-batch to the sums of the step: of real, of fake, and how many."""
        count = logits_real.new_tensor(logits_real.shape[0])
        sums = torch.stack([logits_real.mean(1).sum(), logits_fake.mean(1).sum(), count])
        self._step_sums = sums if self._step_sums is None else self._step_sums + sums
