"""
Representation alignment (REPA, arXiv 2410.06940): an early block of the generator learns to predict the features that
a frozen vision model gives of the clean image.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from .targets import FeatureTarget, feature_loss


class FeatureAlignment(nn.Module):
    """
    A three-layer SiLU projector from the tokens of one block to a target's features (REPA, section 3.3).

    How the 1D tokens of a MAETok latent meet the patch grid: in order. Of `N` patches in row-major order, token `i` of
    `L` is compared with the patches from `i * N / L` up to `(i + 1) * N / L`; its projection is repeated for each. (Of
    128 tokens and 16 x 16 patches, each token has two neighbours in a row.) Latent tokens have no place in the image,
    so any such assignment is a choice, and this one is fixed.

    The module exists in training only and is not saved with the transformer. The target stays outside the module tree,
    where nothing wraps, shards or saves it; [`~FeatureAlignment.move_frozen`] moves it.

    Args:
        target ([`FeatureTarget`]): The frozen model, see [`~maetok_hf.training.teachers.load_teacher`].
        in_features (`int`): Width of the transformer.
        layer (`int`, *optional*, defaults to 8): Number of the block whose output is projected, counted from 1 (REPA:
            8 for all sizes).
        hidden_size (`int`, *optional*, defaults to 2048): Width of the projector (REPA's code).

    Raises:
        ValueError: If a size or `layer` is not positive.
    """

    def __init__(self, target: FeatureTarget, in_features: int, layer: int = 8, hidden_size: int = 2048):
        super().__init__()
        for name, value in {"in_features": in_features, "layer": layer, "hidden_size": hidden_size}.items():
            if value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.layer = layer
        self.projector = nn.Sequential(
            nn.Linear(in_features, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, target.feature_dim),
        )
        if isinstance(target, nn.Module):
            target.requires_grad_(False).eval()
        # a dictionary is not searched for modules
        self._frozen = {"target": target}

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

    def forward(self, hidden_states: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, L, in_features)`): Output of the block.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Clean images in `[-1, 1]`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size,)`: The target's `feature_loss`, for REPA the negative cosine
            similarity in `[-1, 1]`, averaged over the patches.

        Raises:
            ValueError: If the number of patches is no multiple of the number of tokens.
        """
        target = self._frozen["target"]
        with torch.no_grad():
            features = target(pixel_values)
        num_tokens = hidden_states.shape[1]
        check_patches_per_token(features.shape[1], num_tokens)
        prediction = self.projector(hidden_states).repeat_interleave(features.shape[1] // num_tokens, dim=1)
        return feature_loss(prediction, features, target.feature_loss).mean(dim=1)


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
