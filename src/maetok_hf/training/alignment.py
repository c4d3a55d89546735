"""
Representation alignment (REPA, arXiv 2410.06940): an early block of the generator learns to predict the features that
a frozen vision model gives of the clean image.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from .targets import FeatureTarget, feature_loss


# what the cosine similarity of torch takes for the length of a shorter vector
NORM_EPSILON = 1e-8


class FeatureAlignment(nn.Module):
    """
    A three-layer SiLU projector from the tokens of one block to a target's features (REPA, section 3.3).

    How the 1D tokens of a MAETok latent meet the patch grid: in order. Of `N` patches in row-major order, token `i` of
    `L` is compared with the patches from `i * N / L` up to `(i + 1) * N / L`; its projection is repeated for each. (Of
    128 tokens and 16 x 16 patches, each token has two neighbours in a row.) Latent tokens have no place in the image,
    so any such assignment is a choice, and this one is fixed.

    The module exists in training only and is not saved with the transformer. The target stays outside the module tree,
    where nothing wraps, shards or saves it; [`~FeatureAlignment.move_frozen`] moves it.

    Without a target the features come with every batch, as [`~maetok_hf.training.token_features.mean_directions`] has
    made them and a cache of latents keeps them. The loss is the same.

    Args:
        target ([`FeatureTarget`], *optional*): The frozen model, see
            [`~maetok_hf.training.teachers.load_teacher`]; `None` where the features come with the batch.
        in_features (`int`): Width of the transformer.
        layer (`int`, *optional*, defaults to 8): Number of the block whose output is projected, counted from 1 (REPA:
            8 for all sizes).
        hidden_size (`int`, *optional*, defaults to 2048): Width of the projector (REPA's code).
        feature_dim (`int`, *optional*): Features of a token, given if, and only if, there is no target.

    Raises:
        ValueError: If a size or `layer` is not positive, or it is not one of `target` and `feature_dim` that is given.
    """

    def __init__(
        self,
        target: FeatureTarget | None,
        in_features: int,
        layer: int = 8,
        hidden_size: int = 2048,
        feature_dim: int | None = None,
    ):
        super().__init__()
        if (target is None) == (feature_dim is None):
            raise ValueError(
                f"`target` is {'missing' if target is None else 'given'} and `feature_dim` is {feature_dim}: give one "
                "of the two, the number of features only where they come with the batch."
            )
        feature_dim = target.feature_dim if feature_dim is None else feature_dim
        sizes = {"in_features": in_features, "layer": layer, "hidden_size": hidden_size, "feature_dim": feature_dim}
        for name, value in sizes.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.layer = layer
        self.projector = nn.Sequential(
            nn.Linear(in_features, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, feature_dim),
        )
        if isinstance(target, nn.Module):
            target.requires_grad_(False).eval()
        # a dictionary is not searched for modules
        self._frozen = {"target": target}

    @property
    def input_name(self) -> str:
        """`str`: What it takes beside the block's output, `"pixel_values"` or `"token_features"`."""
        return "token_features" if self._frozen["target"] is None else "pixel_values"

    def move_frozen(self, device: torch.device | str) -> "FeatureAlignment":
        """
        Move the target, which `.to()` does not reach.

        Args:
            device (`torch.device` or `str`): Where the batches are.

        Returns:
            [`FeatureAlignment`]: Itself.
        """
        if isinstance(self._frozen["target"], nn.Module):
            self._frozen["target"].to(device)
        return self

    def forward(self, hidden_states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, L, in_features)`): Output of the block.
            source (`torch.Tensor`): What `input_name` says. With a target the clean images,
                `(batch_size, 3, height, width)` in `[-1, 1]`; without one the features,
                `(batch_size, L, feature_dim)` in any floating-point type.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`: The target's `feature_loss`, for REPA and without a target
            the negative cosine similarity in `[-1, 1]`, averaged over the patches.

        Raises:
            ValueError: If the number of patches is no multiple of the number of tokens, or the features are not of the
                shape of the projection.
        """
        target, num_tokens = self._frozen["target"], hidden_states.shape[1]
        if target is None:
            return self._distance_to_means(self.projector(hidden_states).float(), source.float())
        with torch.no_grad():
            features = target(source)
        check_patches_per_token(features.shape[1], num_tokens)
        prediction = self.projector(hidden_states).repeat_interleave(features.shape[1] // num_tokens, dim=1)
        return feature_loss(prediction, features, target.feature_loss).mean(dim=1)

    @staticmethod
    def _distance_to_means(prediction: torch.Tensor, token_features: torch.Tensor) -> torch.Tensor:
        """The mean of the negative cosine similarities with a token's patches, by the mean of their directions."""
        if prediction.shape != token_features.shape:
            raise ValueError(
                f"`token_features` must have shape {tuple(prediction.shape)}, one vector for each token, got "
                f"{tuple(token_features.shape)}."
            )
        directions = F.normalize(prediction, dim=-1, eps=NORM_EPSILON)
        return -(directions * token_features).sum(dim=-1).mean(dim=1)


def check_patches_per_token(num_patches: int, num_tokens: int) -> None:
    """
    Refuse a patch grid that cannot be divided evenly among the tokens.

    Args:
        num_patches (`int`): Patches of an image, `N`.
        num_tokens (`int`): Latent tokens, `L`.

    Raises:
        ValueError: If `N` is no multiple of `L`.
    """
    if num_patches % num_tokens:
        raise ValueError(
            f"the alignment compares each latent token with an equal number of patches, but {num_patches} patches are "
            f"no multiple of {num_tokens} tokens: use images of another size, or train without alignment."
        )


@contextlib.contextmanager
def recorded_output(block: nn.Module) -> Iterator[list[torch.Tensor]]:
    """
    Record what a block returns while the context is open.

    It is the tensor that the next block is given, so gradients reach the block by both; also where blocks are
    compiled, or where gradient checkpointing calls them once more in the backward pass, when the context is closed.

    Args:
        block (`nn.Module`): The block.
    """
    outputs: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
