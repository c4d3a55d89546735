"""
Features of a frozen vision model beside cached latents: what [`~maetok_hf.training.alignment.FeatureAlignment`] needs
of an image, computed once instead of in every step.

Stored for each token is the mean of its patches' feature vectors, each divided by its length. The mean is shorter than
1 and must stay so: the negative cosine similarity of a prediction and the patches of a token, averaged over these, is
the negative inner product of the prediction's direction with that mean. So nothing is lost but the last digits:
float16 changes the loss by less than 0.0005.
"""

import hashlib
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin

from ..models import AutoencoderMAE
from .alignment import NORM_EPSILON, check_patches_per_token
from .latent_encoding import hash_tensors
from .model_card import is_on_hub, public_name
from .sit_recipe import SiTRecipe
from .targets import FeatureTarget
from .teachers import PROCESSOR_FILES, TeacherTarget, load_teacher


logger = logging.getLogger(__name__)


def mean_directions(features: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """
    Features of patches made into those of tokens: of each token the mean of its patches' unit vectors.

    Args:
        features (`torch.Tensor` of shape `(batch_size, N, feature_dim)`): Features of patches in row-major order.
        num_tokens (`int`): Tokens, `L`. Token `i` has the patches from `i * N / L` up to `(i + 1) * N / L`.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, L, feature_dim)`: Vectors of length 1 at most, not to be normalised.

    Raises:
        ValueError: If the number of patches is no multiple of the number of tokens.
    """
    check_patches_per_token(features.shape[1], num_tokens)
    directions = F.normalize(features.float(), dim=-1, eps=NORM_EPSILON)
    return directions.unflatten(1, (num_tokens, -1)).mean(dim=2)


def load_cached_teacher(
    pretrained_model_name_or_path: str,
    dtype: str,
    tokenizer: ModelMixin,
    resolution: int,
    revision: str | None = None,
) -> TeacherTarget:
    """
    The DINOv2 model whose features are to be cached, compared as a generator's recipe does.

    Args:
        pretrained_model_name_or_path (`str`): Folder or Hub repository.
        dtype (`str`): Precision of the model: `"bfloat16"`, `"float16"` or `"float32"`.
        tokenizer (`ModelMixin`): The tokenizer, an [`AutoencoderMAE`]: its patches are those of the alignment.
        resolution (`int`): Height and width of the images.
        revision (`str`, *optional*): Commit of the model on the Hub.

    Returns:
        [`TeacherTarget`]: On the CPU.

    Raises:
        OSError: If the model cannot be found or read.
        ValueError: If the tokenizer is of another class, or the patches cannot be shared out to its tokens.
    """
    if not isinstance(tokenizer, AutoencoderMAE):
        raise ValueError(
            f"`alignment_model` needs the patches of an AutoencoderMAE, but the tokenizer is a "
            f"{type(tokenizer).__name__}: leave it out."
        )
    patch_size, num_tokens = tokenizer.config.patch_size, tokenizer.config.num_latent_tokens
    num_patches = (resolution // patch_size) ** 2
    check_patches_per_token(num_patches, num_tokens or num_patches)
    place = {"patch_size": patch_size, "dtype": getattr(torch, dtype), "revision": revision}
    return load_teacher("dinov2", pretrained_model_name_or_path, **place)


def teacher_identity(target: TeacherTarget, pretrained_model_name_or_path: str) -> dict[str, Any]:
    """
    What makes a teacher the same one, in plain values.

    Args:
        target ([`TeacherTarget`]): The teacher as it was loaded.
        pretrained_model_name_or_path (`str`): Its name.

    Returns:
        `dict[str, Any]`: Its `model` (of a folder the last part of the path), `dtype` and `digest`, which changes with
        any weight and with the statistics of the images.
    """
    digest = hashlib.blake2b(str((target.teacher_patch_size, target.patch_size)).encode(), digest_size=16)
    hash_tensors(digest, {"scale": target.scale, "shift": target.shift} | target.state_dict())
    return {
        "model": public_name(pretrained_model_name_or_path),
        "dtype": str(target.dtype).removeprefix("torch."),
        "digest": digest.hexdigest(),
    }


def find_stored_teacher(pretrained_model_name_or_path: str, revision: str | None = None) -> Path | None:
    """
    Where a teacher lies on this machine. Nothing is read but names, and nothing is asked of the Hub.

    Args:
        pretrained_model_name_or_path (`str`): Folder or Hub repository.
        revision (`str`, *optional*): Branch, tag or commit on the Hub; by default the main branch as it was last seen.

    Returns:
        `Path`, *optional*: A folder with a config and weights; for a Hub repository that of the Hub's cache, which
        then has the settings of its image processor, too. `None` if there is none.
    """
    from huggingface_hub import snapshot_download

    folder, needed = Path(pretrained_model_name_or_path), [("config.json",), ("*.safetensors",)]
    if not folder.is_dir():
        if not is_on_hub(pretrained_model_name_or_path):
            return None
        try:
            folder = Path(snapshot_download(pretrained_model_name_or_path, revision=revision, local_files_only=True))
        except OSError:
            return None
        needed.append(PROCESSOR_FILES)  # a folder may be without, but of a repository it may not have been fetched
    there = all(any(any(folder.glob(pattern)) for pattern in patterns) for patterns in needed)
    return folder if there else None


def stored_digest(folder: str | os.PathLike) -> str:
    """
    A short text that changes with any file that a teacher is made of. Other than that of [`teacher_identity`], it
    needs no memory for the weights, and is the same whatever names a version of transformers gives them; but it also
    changes where the same weights are stored in another way.

    Args:
        folder (`str` or `os.PathLike`): From [`find_stored_teacher`].

    Raises:
        OSError: If a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".safetensors" or path.name in ("config.json", *PROCESSOR_FILES):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, hashlib.blake2b)
            digest.update(path.name.encode() + content.digest())
    return digest.hexdigest()


class TokenFeatureEncoder:
    """
    Makes of images the features that a cache stores beside their latents.

    Args:
        target ([`FeatureTarget`]): The frozen model, whose `feature_loss` is `"cosine"`.
        num_views (`int`): 1, or 2 with the mirrored images.
        num_tokens (`int`): Tokens of a latent.

    Raises:
        ValueError: If the target's features are compared in another way.
    """

    def __init__(self, target: FeatureTarget, num_views: int, num_tokens: int):
        if target.feature_loss != "cosine":
            raise ValueError(
                f"features can be cached for each token where they are compared by 'cosine', not by "
                f"{target.feature_loss!r}."
            )
        self.target, self.num_views, self.num_tokens = target, num_views, num_tokens

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images in `[-1, 1]`.

        Returns:
            `torch.HalfTensor` of shape `(num_views, batch_size, num_tokens, feature_dim)`: On the CPU.

        Raises:
            ValueError: If a feature is not finite.
        """
        views = [images, images.flip(-1)][: self.num_views]
        features = torch.stack([mean_directions(self.target(view), self.num_tokens).half() for view in views]).cpu()
        if not features.isfinite().all():
            raise ValueError(
                "`alignment_model` gives features that are not finite: it is broken, or needs another "
                "`alignment_dtype`."
            )
        return features


def check_cached_features(
    metadata: Mapping[str, Any], recipe: SiTRecipe, tokenizer_name_or_path: str, description: str, patch_size: int
) -> None:
    """
    Make sure that cached latents come with the features that a recipe aligns a generator with.

    The recipe's model is compared with that of the features by name and precision, and where it is on this machine (a
    folder, or in the Hub's cache) by what is in it: by its files and, only if these differ, by its weights, for which
    every process loads it once. Where it is not, a warning says so. Nothing is asked of the Hub.

    Args:
        metadata (`Mapping[str, Any]`): `metadata` of the [`~maetok_hf.data.LatentSource`].
        recipe ([`SiTRecipe`]): The recipe, with an `alignment_weight`.
        tokenizer_name_or_path (`str`): The tokenizer, for the command that would cache them.
        description (`str`): What the cache is, for messages.
        patch_size (`int`): Side in pixels of the tokenizer's patches.

    Raises:
        OSError: If the recipe's model is a folder, but damaged.
        ValueError: If there are none, or they are of another model or precision, or of one of the same name with
            other weights or statistics of the images.
    """
    wanted = {"model": public_name(recipe.alignment_model), "dtype": recipe.alignment_dtype}
    found = metadata.get("alignment")
    if found is not None and {name: found[name] for name in wanted} == wanted:
        _check_same_weights(metadata, recipe, tokenizer_name_or_path, description, patch_size)
        return
    there = "none" if found is None else f"those of {found['model']!r} in {found['dtype']}"
    others = "" if found is None else "give the recipe `alignment_model` and `alignment_dtype` of the cache, "
    raise ValueError(
        f"`alignment_weight` = {recipe.alignment_weight} needs features of {wanted['model']!r} in {wanted['dtype']}, "
        f"but {description} hold {there}. Cache the latents with them in another folder, by\n"
        f"  {_caching_command(metadata, recipe, tokenizer_name_or_path)}\n"
        f"or {others}give `dataset_name` instead of `latents_name_or_path`, or set `alignment_weight` to 0."
    )


def _check_same_weights(
    metadata: Mapping[str, Any], recipe: SiTRecipe, tokenizer_name_or_path: str, description: str, patch_size: int
) -> None:
    """Compare the recipe's model with that of the features, which has its name and precision, by what is in it."""
    name, found = recipe.alignment_model, metadata["alignment"]
    folder, target = find_stored_teacher(name), None
    if folder is not None:
        if stored_digest(folder) == found.get("stored_digest"):
            return
        # Stored in another way, of another commit, or another one. The weights have to be loaded to tell: their names
        # in the files are not those that the digest in the cache is made of.
        try:
            target = load_teacher("dinov2", folder, patch_size, dtype=getattr(torch, recipe.alignment_dtype))
        except OSError:
            if Path(name).is_dir():
                raise
            # a download into the Hub's cache that did not end
    if target is None:
        logger.warning(
            "The model %r of the recipe is neither a folder with weights nor whole in the Hub's cache: it was "
            "compared with that of the features in %s by its name and precision alone, not by its weights.",
            name, description,
        )  # fmt: skip
        return
    digest = teacher_identity(target, name)["digest"]
    if digest == found["digest"]:
        return
    commit = f", commit {found['revision']} on the Hub" if found.get("revision") else ""
    raise ValueError(
        f"`alignment_model` {name!r} (digest {digest}) has other weights, or other statistics of the images, than the "
        f"model {found['model']!r} whose features {description} hold (digest {found['digest']}{commit}): give the "
        f"recipe that one, or cache the latents with this one in another folder, by\n"
        f"  {_caching_command(metadata, recipe, tokenizer_name_or_path)}"
    )


def _caching_command(metadata: Mapping[str, Any], recipe: SiTRecipe, tokenizer_name_or_path: str) -> str:
    """The command that makes these latents with the features of a recipe."""
    flags = {
        "tokenizer_name_or_path": tokenizer_name_or_path,
        "dataset_name": metadata["dataset"]["name"],
        "dataset_config_name": metadata["dataset"]["config_name"],
        "dataset_revision": metadata["dataset"]["revision"],
        "split": metadata["split"],
        "resolution": metadata["resolution"],
        "random_flip": str(metadata["num_views"] == 2).lower(),
        "dtype": metadata["dtype"],
        "mixed_precision": metadata["mixed_precision"],
        "alignment_model": recipe.alignment_model,
        "alignment_dtype": recipe.alignment_dtype,
        "output_dir": "outputs/latents-with-features",
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return shlex.join(["accelerate", "launch", "examples/cache_latents.py", *words])
