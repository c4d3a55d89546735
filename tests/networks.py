"""Tiny stand-ins, with random weights, for the networks that a full recipe loads: saved as the real ones are."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


CAPTIONS = ["a red square on the left", "a blue square at the top", "squares"]


def save_networks(folder: Path) -> dict[str, str]:
    """
    Write a DINOv2, a SigLIP, a DINO trunk, a caption tokenizer and the trunk of LPIPS into a folder.

    Returns:
        Recipe settings that name them. LPIPS is found if the environment has `TORCH_HOME` set to the folder.
    """
    torch.manual_seed(0)
    _save_teachers(folder)
    _save_trunk(folder / "trunk")
    _save_caption_tokenizer(folder / "captions")
    _save_perceptual_trunk(folder)
    return {
        "dinov2_model": str(folder / "dinov2"),
        "siglip_model": str(folder / "siglip"),
        "discriminator_model": f"local-dir:{folder / 'trunk'}",
        "text_tokenizer": str(folder / "captions"),
        "perceptual_network": "squeeze",
    }


def _save_teachers(folder: Path) -> None:
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        SiglipImageProcessor,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**sizes, patch_size=14, image_size=56)).save_pretrained(folder / "dinov2")
    BitImageProcessor().save_pretrained(folder / "dinov2")
    config = SiglipVisionConfig(**sizes, intermediate_size=64, patch_size=14, image_size=56)
    SiglipVisionModel(config).save_pretrained(folder / "siglip")
    SiglipImageProcessor().save_pretrained(folder / "siglip")


def _save_trunk(folder: Path) -> None:
    from timm.models import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    folder.mkdir()
    save_file(VisionTransformer(**sizes, num_classes=0).state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_small_patch16_224",
        "num_classes": 0,
        "model_args": sizes,
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 0, "first_conv": "patch_embed.proj"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def _save_caption_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CAPTIONS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def _save_perceptual_trunk(folder: Path) -> None:
    from torchvision.models import squeezenet1_1

    checkpoints = folder / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(squeezenet1_1(weights=None).state_dict(), checkpoints / "squeezenet1_1-b8a52dc0.pth")
