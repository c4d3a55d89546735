"""`maetok-convert`: the authors' checkpoints to a folder that `from_pretrained` loads, verified, with a card."""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from ..conversion import AuthorsCheckpoint, published, verify_autoencoder, verify_transformer
from ..conversion.card import CARD, make_card
from ..conversion.imagenet import imagenet_id2label
from ..conversion.source import Source, find_source, is_licence
from ..models import AutoencoderMAE
from ..pipelines import MAETokDiffusionPipeline
from ..pipelines.components import check_transformer
from ..pipelines.guidance import check_guidance_interval, check_guidance_scale
from ..pipelines.labels import check_id2label
from ..schedulers import FlowMatchEulerMaruyamaScheduler
from ..training.checkpointing import flush_to_disk
from ..training.configuration import refuse_effectless
from ..training.hub_files import check_upload, upload_files
from ..training.interruption import LOCK_FILE, RunLock
from .command_line import parse_words, quiet_others, reported_errors


PROG = "maetok-convert"
DESCRIPTION = """\
Convert checkpoints in the format of MAETok's authors, folders or Hub repositories: a tokenizer alone, or with a
transformer into a pipeline. What was written is compared with the authors' weights, tensor by tensor and by its
outputs, before it gets its name; nothing that is read can run code.
"""
EXAMPLES = f"""\
  {PROG} MAETok/maetok-b-128 --transformer MAETok/sit-xl_maetok-b-128 --output maetok-sit-xl-256
  {PROG} MAETok/maetok-b-512 --transformer MAETok/sit-xl_maetok-b-128-512 --output maetok-sit-xl-512 \\
      --dtype float32 bfloat16 --push_to_hub user/maetok-sit-xl-512 --hub_private_repo
  {PROG} MAETok/maetok-b-128 --output maetok-b-128
  {PROG} runs/tokenizer --transformer runs/sit/0400000.pt --output converted --id2label names.json
"""
NOTES = """
Then MAETokDiffusionPipeline.from_pretrained("maetok-sit-xl-256")(class_labels=207) samples as published.

exit codes: 0 when all is done, 1 if something cannot be read, converted, written or uploaded, 2 for a wrong command
line. After 1 there is no output, unless only the upload failed.
"""
VARIANTS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
IMAGENET_CLASSES = 1000
NO_NAMES, IMAGENET_NAMES = "none", "imagenet"
# of files beside the weights
SPARE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """
    Options of `maetok-convert`.

    Args:
        tokenizer (`str`):
            Tokenizer in the authors' format: a folder or Hub repository with config.json and model.safetensors, or a
            .pt file of their training code.
        output (`str`):
            Folder to write, which must not exist or be empty.
        transformer (`str`, *optional*):
            SiT in the authors' format, trained on the latents of this tokenizer; with it the output is a pipeline.
        revision (`str`, *optional*):
            Branch, tag or commit of the tokenizer's repository.
        transformer_revision (`str`, *optional*):
            Branch, tag or commit of the transformer's repository.
        dtype (`list[str]`, *optional*, defaults to `["float32"]`):
            Dtypes of the weights. The first is what loads by default; each further one is added as a variant, fp32,
            fp16 or bf16.
        id2label (`str`, *optional*):
            Names of the classes: `imagenet`, `none`, or a JSON file of names by class index. By default `imagenet` for
            a transformer of 1000 classes, else `none`.
        num_inference_steps (`int`, *optional*):
            Steps that the pipeline takes by default; by default the published ones, 250.
        guidance_scale (`float`, *optional*):
            Scale of guidance that the pipeline has by default; by default the published one, 1.5 for images of 512
            pixels and 1.9 for others.
        guidance_interval (`list[float]`, *optional*):
            Lowest and highest time of guidance that the pipeline has by default; by default the published ones, 0 and
            0.7 for images of 512 pixels, 0 and 0.75 for others.
        latents_mean (`float`, *optional*):
            Mean of the latents, instead of `vq_mean` of the tokenizer's config.
        latents_std (`float`, *optional*):
            Standard deviation of the latents, instead of `vq_std` of the tokenizer's config.
        license (`str`, *optional*):
            Licence for the card's metadata, by its identifier on the Hub; by default the one that the sources name.
        push_to_hub (`str`, *optional*):
            Hub repository to upload to as well; it is created if it does not exist.
        hub_private_repo (`bool`, *optional*, defaults to `False`):
            Make that repository private if it is created.
    """

    tokenizer: str
    output: str
    transformer: str | None = None
    revision: str | None = None
    transformer_revision: str | None = None
    dtype: list[Literal["float32", "float16", "bfloat16"]] = field(default_factory=lambda: ["float32"])
    id2label: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: list[float] | None = None
    latents_mean: float | None = None
    latents_std: float | None = None
    license: str | None = None
    push_to_hub: str | None = None
    hub_private_repo: bool = False

    def __post_init__(self):
        if self.transformer is None:
            names = ("transformer_revision", "id2label", "num_inference_steps", "guidance_scale", "guidance_interval")
            refuse_effectless(self, names, "without `transformer`")
        if not self.dtype or len(set(self.dtype)) < len(self.dtype):
            raise ValueError(f"`dtype` must name one or more dtypes, each once, got {self.dtype}.")
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, got {self.num_inference_steps}.")
        if self.latents_mean is not None and not math.isfinite(self.latents_mean):
            raise ValueError(f"`latents_mean` must be finite, got {self.latents_mean}.")
        if self.latents_std is not None and not 0 < self.latents_std < math.inf:
            raise ValueError(f"`latents_std` must be positive and finite, got {self.latents_std}.")
        if self.license is not None and not is_licence(self.license):
            raise ValueError(
                f"`license` must be an identifier of the Hub, such as apache-2.0 or other, got {self.license!r}."
            )
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.guidance_interval is not None:
            check_guidance_interval(self.guidance_interval)
        if self.push_to_hub is None:
            refuse_effectless(self, ("hub_private_repo",), "without `push_to_hub`")
        else:
            from huggingface_hub.utils import validate_repo_id

            try:
                validate_repo_id(self.push_to_hub)
            except ValueError as error:
                raise ValueError(f"`push_to_hub`: {error}") from error


def parse_options(words: Sequence[str] | None = None) -> ConvertOptions:
    """
    The command line: the tokenizer, and one flag for every other field of [`ConvertOptions`].

    Args:
        words (`Sequence[str]`, *optional*): Its words; by default those of this process.

    Returns:
        [`ConvertOptions`]: What is asked for.

    Raises:
        SystemExit: With a message, if a flag or its value is wrong.
    """
    return parse_words(PROG, DESCRIPTION, EXAMPLES, ConvertOptions, words, positional=("tokenizer",), notes=NOTES)


def check_output(output: str) -> Path:
    """
    Where to write.

    Args:
        output (`str`): A folder that does not exist or is empty.

    Returns:
        `Path`: Its absolute path.

    Raises:
        ValueError: If it is a file, or has anything in it, or is the folder that this process works in.
    """
    path = Path(output).resolve()
    if path == Path.cwd():
        raise ValueError(f"`output` is the current folder, {path}: name a new one.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"`output` {path} is not empty: name another folder, or remove it.")
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output` {path} is a file: name a folder.")
    return path


def resolve_names(id2label: str | None, num_classes: int) -> dict[int, str] | None:
    """
    The names of the classes that are asked for.

    Args:
        id2label (`str`, *optional*): `"imagenet"`, `"none"`, a JSON file, or nothing.
        num_classes (`int`): Classes of the transformer.

    Returns:
        `dict[int, str]` or `None`: Names by class index.

    Raises:
        ImportError: If the names of ImageNet are needed and `timm` is not installed.
        ValueError: If the file cannot be used, or the names are not those of so many classes.
    """
    if id2label is None:
        id2label = IMAGENET_NAMES if num_classes == IMAGENET_CLASSES else NO_NAMES
    if id2label == NO_NAMES:
        return None
    if id2label == IMAGENET_NAMES:
        if num_classes != IMAGENET_CLASSES:
            raise ValueError(f"`id2label` is 'imagenet', which has 1000 classes; the transformer has {num_classes}.")
        return imagenet_id2label()
    path = Path(id2label)
    if not path.is_file():
        raise ValueError(f"`id2label` must be 'imagenet', 'none' or a JSON file, and there is no file {path}.")
    try:
        names = check_id2label(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`id2label` {path} cannot be used: {error}") from error
    unknown = sorted(index for index in names or {} if index >= num_classes)
    if unknown:
        raise ValueError(f"`id2label` {path} names classes {unknown}; the transformer has {num_classes} classes.")
    return names


def cast(model: ModelMixin, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """
    Cast a model as `from_pretrained` does, which keeps rotary frequencies in float32.

    Args:
        model ([`ModelMixin`]): In float32; changed in place.
        dtype (`torch.dtype`): The dtype.

    Returns:
        `dict[str, torch.dtype]`: Dtypes of its tensors by name.

    Raises:
        ValueError: If weights are too large for the dtype.
    """
    kept = set(model._keep_in_fp32_modules or [])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
            if not tensor.isfinite().all():
                raise ValueError(f"`dtype`: {name} has values that {dtype} cannot hold; bfloat16 can.")
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


class Conversion:
    """
    One conversion, from the check of its sources to the folder with its name.

    Args:
        options ([`ConvertOptions`]): What is asked for.

    Raises:
        ImportError: If the names of ImageNet are needed and `timm` is not installed.
        ValueError: If a source cannot be found, or anything else is wrong that can be known before weights are read.
    """

    def __init__(self, options: ConvertOptions):
        self.options = options
        self.output = check_output(options.output)
        asked = [("tokenizer", options.tokenizer, options.revision)]
        if options.transformer is not None:
            asked.append(("transformer", options.transformer, options.transformer_revision))
            published.check_pair(options.tokenizer, options.transformer)
        self.sources: list[Source] = []
        self.checkpoints: dict[str, AuthorsCheckpoint] = {}
        for kind, name, revision in asked:
            with self._about(kind):
                source = find_source(kind, name, revision)
                # one commit for all files, whatever is pushed meanwhile
                self.checkpoints[kind] = AuthorsCheckpoint(kind, name, revision=source.revision or revision)
            self.sources.append(source)
        self._set_statistics()
        self.id2label = None
        if options.transformer is not None:
            self.id2label = resolve_names(options.id2label, self.checkpoints["transformer"].config["num_classes"])
        self.repo_id = options.push_to_hub
        if self.repo_id is not None:  # which makes the repository: not for a misspelt source
            self.repo_id = check_upload(self.repo_id, private=options.hub_private_repo)

    @contextlib.contextmanager
    def _about(self, kind: str) -> Iterator[None]:
        """Say of which checkpoint an error is."""
        try:
            yield
        except (OSError, ValueError) as error:
            raise ValueError(f"{kind} {getattr(self.options, kind)}: {error}") from error

    def _set_statistics(self) -> None:
        config = self.checkpoints["tokenizer"].config
        for key, value in (("vq_mean", self.options.latents_mean), ("vq_std", self.options.latents_std)):
            if value is not None:
                config[key] = value
        missing = [name for name in ("mean", "std") if config.get(f"vq_{name}") is None]
        if missing and self.options.transformer is not None:
            flags = " and ".join(f"--latents_{name}" for name in missing)
            raise ValueError(
                f"the tokenizer's config has no {' and '.join(f'`vq_{name}`' for name in missing)}, without which a "
                f"pipeline cannot decode what the transformer samples: pass {flags}."
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """`dict[str, Any]`: Steps and guidance of the pipeline, and whether they are the recommended ones."""
        options = self.options
        size = self.checkpoints["tokenizer"].config["image_size"]
        scale, interval = published.recommended_guidance(size, options.transformer)
        recommended = {
            "num_inference_steps": published.NUM_INFERENCE_STEPS,
            "guidance_scale": scale,
            "guidance_interval": list(interval),
        }
        asked = {name: getattr(options, name) for name in recommended}
        chosen = recommended | {name: value for name, value in asked.items() if value is not None}
        sizes = {known.sample_size for known in published.TOKENIZERS.values()}
        return chosen | {"recommended": chosen == recommended and size in sizes}

    def run(self) -> Path:
        """
        Convert, verify, give the folder its name, and upload it if that is asked for.

        Returns:
            `Path`: The folder.

        Raises:
            OSError: If the folder cannot be written, or the upload fails.
            ValueError: If weights cannot be found or converted, or the result is not what they are.
        """
        unfinished = self.output.with_name(f".{self.output.name}.partial")
        lock = self._begin(unfinished)
        try:
            self._write(unfinished)
            (unfinished / LOCK_FILE).unlink()
            flush_to_disk(unfinished)
            os.replace(unfinished, check_output(str(self.output)))
        except SafetensorError as error:  # what it raises where the system refuses to write
            raise OSError(f"{self.output} cannot be written: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            lock.release()
        print(f"{self.output} is complete.", flush=True)
        if self.repo_id is not None:
            print(f"Uploading to {self.repo_id}", flush=True)
            repo_id = upload_files(
                self.output, self.repo_id, f"Converted by {PROG}", private=self.options.hub_private_repo
            )
            print(f"It is on the Hub: {repo_id}", flush=True)
        return self.output

    def _begin(self, folder: Path) -> RunLock:
        """Make the folder, or empty that of a conversion that was killed, and keep others out of it."""
        if folder.is_symlink():
            folder.unlink()  # what it leads to is not ours to empty
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = RunLock(folder, patience=0.0)
        except ValueError as error:
            raise ValueError(
                f"`output` {self.output} is being written by another process: wait for it, or name another folder."
            ) from error
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()
        return lock

    def _write(self, folder: Path) -> None:
        main, *others = self.options.dtype
        variants = {VARIANTS[name]: name for name in others}
        for source in self.sources:
            revision = f" at {source.revision}" if source.revision else ""
            print(f"Reading the {source.part} {source.name}{revision}", flush=True)
            with self._about(source.part):
                self.checkpoints[source.part].read()
        self._check_disk_space(folder)
        differences: dict[str, float] = {}
        for variant, name in {None: main, **variants}.items():
            print(f"Writing and comparing weights in {name}", flush=True)
            models = {}
            for kind, checkpoint in self.checkpoints.items():
                with self._about(kind):
                    models[kind] = checkpoint.convert()
            dtypes = {kind: cast(model, getattr(torch, name)) for kind, model in models.items()}
            self._save(folder, models, variant)
            del models
            for kind, found in self._verify(folder, variant, dtypes).items():
                differences[kind] = max(found, differences.get(kind, 0.0))
        print("Every tensor comes back in the authors' format, and the outputs are theirs up to rounding:", flush=True)
        print("\n".join(f"  {name}: {value:.1e} of their size" for name, value in differences.items()), flush=True)
        self._write_card(folder, variants, differences)

    def _check_disk_space(self, folder: Path) -> None:
        count = sum(
            tensor.numel() for checkpoint in self.checkpoints.values() for tensor in checkpoint.state_dict.values()
        )
        needed = sum(count * getattr(torch, name).itemsize for name in self.options.dtype) + SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"`output` {self.output} takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there: make "
                "room, or name a folder on another disk."
            )

    def _save(self, folder: Path, models: Mapping[str, ModelMixin], variant: str | None) -> None:
        vae = models["tokenizer"]
        if "transformer" not in models:
            vae.save_pretrained(folder, variant=variant)
            return
        transformer, sampling = models["transformer"], self.sampling
        check_transformer(transformer, vae, self.id2label)
        pipe = MAETokDiffusionPipeline(
            vae,
            transformer,
            FlowMatchEulerMaruyamaScheduler(path=transformer.config.path),
            id2label=self.id2label,
            default_num_inference_steps=sampling["num_inference_steps"],
            default_guidance_scale=sampling["guidance_scale"],
            default_guidance_interval=sampling["guidance_interval"],
        )
        pipe.save_pretrained(folder, variant=variant)

    def _verify(
        self, folder: Path, variant: str | None, dtypes: Mapping[str, Mapping[str, torch.dtype]]
    ) -> dict[str, float]:
        """Load what was written, and compare it with the authors' weights."""
        tokenizer, transformer = self.checkpoints["tokenizer"], self.checkpoints.get("transformer")
        if transformer is None:
            vae = AutoencoderMAE.from_pretrained(folder, variant=variant, dtype=torch.float32)
            return verify_autoencoder(vae, tokenizer.config, tokenizer.state_dict, dtypes["tokenizer"]).differences
        pipe = MAETokDiffusionPipeline.from_pretrained(folder, variant=variant, dtype=torch.float32)
        first = verify_autoencoder(pipe.vae, tokenizer.config, tokenizer.state_dict, dtypes["tokenizer"])
        second = verify_transformer(
            pipe.transformer, transformer.config, transformer.state_dict, dtypes["transformer"]
        )
        return first.differences | second.differences

    def _write_card(self, folder: Path, variants: Mapping[str, str], differences: Mapping[str, float]) -> None:
        def config_of(subfolder: str) -> dict[str, Any]:
            return json.loads((folder / subfolder / "config.json").read_text(encoding="utf-8"))

        is_pipeline = "transformer" in self.checkpoints
        vae = {"latents_mean": None} | config_of("vae" if is_pipeline else "")
        card = make_card(
            self.repo_id or self.output.name,
            sources=self.sources,
            vae=vae,
            transformer=config_of("transformer") if is_pipeline else None,
            sampling=self.sampling if is_pipeline else None,
            id2label=self.id2label,
            dtypes=self.options.dtype,
            variants=variants,
            differences=differences,
            version=version("maetok_hf"),
            license=self.options.license,
        )
        (folder / CARD).write_text(card, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        argv (`Sequence[str]`, *optional*): Words of the command line; by default those of this process.

    Raises:
        SystemExit: With a message, which makes the status 1, if something cannot be read, converted, written or
            uploaded.
    """
    options = parse_options(argv)
    quiet_others()
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with reported_errors(PROG):
            Conversion(options).run()
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    main()
