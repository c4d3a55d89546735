"""The README of a converted checkpoint; `python -m maetok_hf.conversion.card FOLDER` writes the published ones'."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from . import published
from .source import Source


TEMPLATE = Path(__file__).with_name("card_template.md")
CARD = "README.md"
PAPER = "https://huggingface.co/papers/2502.03444"
DATASET = "ILSVRC/imagenet-1k"
# ADM's statistics of the training images, by the side of these
REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
SHOWN_CLASS = 207  # that of the paper's and everyone's examples
_METRIC_NAMES = {
    "rfid": "rFID",
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "fid": "FID",
    "inception_score": "Inception Score",
}
_LICENCE = {"licence_file": None, "stated_licence": "apache-2.0"}


def _result(task: str, metric: str, value: float, split: str, size: int, protocol: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=DATASET,
        dataset_name=f"ImageNet-1k, {size} x {size}",
        dataset_split=split,
        metric_type=metric,
        metric_name=_METRIC_NAMES[metric],
        metric_value=value,
        metric_args={"protocol": protocol},
        source_name="the authors' paper",
        source_url=PAPER,
    )


def _tokenizer_results(tokenizer: published.PublishedTokenizer) -> list[EvalResult]:
    return [
        _result(
            "image-feature-extraction",
            metric,
            value,
            "validation",
            tokenizer.sample_size,
            "reconstructions of the 50 000 validation images",
        )
        for metric, value in tokenizer.metrics.items()
    ]


def _transformer_results(transformer: published.PublishedTransformer) -> list[EvalResult]:
    low, high = transformer.guidance_interval
    guidance = f"classifier-free guidance {transformer.guidance_scale} at times in [{low:g}, {high:g}]"
    return [
        _result(
            "unconditional-image-generation",
            metric,
            value,
            "train",
            published.TOKENIZERS[transformer.tokenizer].sample_size,
            f"50 000 samples, Euler-Maruyama, {published.NUM_INFERENCE_STEPS} steps, {how}",
        )
        for how, metrics in (("no guidance", transformer.unguided_metrics), (guidance, transformer.metrics))
        for metric, value in metrics.items()
    ]


def _known(sources: Sequence[Source]) -> bool:
    tables = {"tokenizer": published.TOKENIZERS, "transformer": published.TRANSFORMERS}
    return all(source.on_hub and source.name in tables[source.part] for source in sources)


def make_card(
    repo_id: str,
    *,
    sources: Sequence[Source],
    vae: Mapping[str, Any],
    transformer: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    id2label: Mapping[int, str] | None = None,
    dtypes: Sequence[str] = ("float32",),
    variants: Mapping[str, str] | None = None,
    differences: Mapping[str, float] | None = None,
    version: str | None = None,
    license: str | None = None,
) -> str:
    """
    Fill the template.

    Args:
        repo_id (`str`): Repository or folder, for the lines that load the weights.
        sources (`Sequence[Source]`): Origin of the tokenizer and, for a pipeline, of the transformer.
        vae (`Mapping[str, Any]`): Config of the tokenizer.
        transformer (`Mapping[str, Any]`, *optional*): Config of the transformer, with `_class_name`; without it the
            card is that of a tokenizer alone.
        sampling (`Mapping[str, Any]`, *optional*): Default `num_inference_steps`, `guidance_scale` and
            `guidance_interval` of the pipeline, and whether they are the `recommended` ones.
        id2label (`Mapping[int, str]`, *optional*): Names of the classes.
        dtypes (`Sequence[str]`, *optional*, defaults to `("float32",)`): Dtypes of the weights, the main ones first.
        variants (`Mapping[str, str]`, *optional*): Dtypes by variant.
        differences (`Mapping[str, float]`, *optional*): What the verification found.
        version (`str`, *optional*): Version of the library.
        license (`str`, *optional*): Licence for the metadata, instead of the one that all sources name.

    Returns:
        `str`: The card, with the published numbers where all sources are published checkpoints.

    Raises:
        ValueError: If its metadata is not valid.
    """
    is_known = _known(sources)
    names = {source.part: source.name for source in sources}
    results = []
    if is_known and transformer is not None:
        results = _transformer_results(published.TRANSFORMERS[names["transformer"]])
    elif is_known:
        results = _tokenizer_results(published.TOKENIZERS[names["tokenizer"]])
    stated = {source.stated_licence for source in sources}
    on_hub = [source.name for source in sources if source.on_hub]
    data = ModelCardData(
        license=license or (stated.pop() if len(stated) == 1 else None),
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if transformer else "image-feature-extraction",
        tags=["maetok", "sit", "class-conditional-image-generation"]
        if transformer
        else ["maetok", "image-tokenizer", "autoencoder"],
        base_model=on_hub or None,
        datasets=[DATASET] if is_known else None,
        model_name=repo_id.rsplit("/", 1)[-1] if results else None,
        eval_results=results or None,
    )
    shown = (id2label or {}).get(SHOWN_CLASS) or next(iter((id2label or {}).values()), None)
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=repo_id.rsplit("/", 1)[-1],
        repo_id=repo_id,
        sources=sources,
        located=any(source.revision for source in sources),
        published=is_known,
        vae=vae,
        transformer=transformer,
        sampling=sampling,
        class_name=shown and json.dumps(shown.split(",")[0].strip()),
        dtypes=list(dtypes),
        variants=variants,
        differences=differences,
        version=version,
        results=results,
        metric_types=[result.metric_type for result in results],
        dataset=DATASET,
        reference=REFERENCES[published.TOKENIZERS[names["tokenizer"]].sample_size] if is_known else None,
    )
    return f"{ModelCard(str(card))}\n"  # parsed once more: what was filled in is valid, too


def published_cards() -> dict[str, str]:
    """
    Cards of all published checkpoints, without what only a conversion finds out: commits and differences.

    Returns:
        `dict[str, str]`: Cards by name.
    """
    cards = {}
    vae = {"num_latent_tokens": 128, "latent_channels": 32, "patch_size": 16, "latents_mean": 0.0}
    for tokenizer in published.TOKENIZERS.values():
        source = Source(part="tokenizer", name=tokenizer.repo_id, on_hub=True, **_LICENCE)
        config = vae | {"sample_size": tokenizer.sample_size}
        cards[tokenizer.card_name] = make_card(tokenizer.card_name, sources=[source], vae=config)
    transformer = {
        "_class_name": "SiTTransformer1DModel",
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "num_classes": 1000,
        "class_dropout_prob": 0.1,
    }
    for known in published.TRANSFORMERS.values():
        parts = (("tokenizer", known.tokenizer), ("transformer", known.repo_id))
        sampling = {
            "num_inference_steps": published.NUM_INFERENCE_STEPS,
            "guidance_scale": known.guidance_scale,
            "guidance_interval": list(known.guidance_interval),
            "recommended": True,
        }
        cards[known.card_name] = make_card(
            known.card_name,
            sources=[Source(part=part, name=name, on_hub=True, **_LICENCE) for part, name in parts],
            vae=vae | {"sample_size": published.TOKENIZERS[known.tokenizer].sample_size},
            transformer=transformer,
            sampling=sampling,
            id2label={SHOWN_CLASS: "golden retriever"},
        )
    return cards


if __name__ == "__main__":
    for name, text in published_cards().items():
        (Path(sys.argv[1]) / f"{name}.md").write_text(text, encoding="utf-8")
