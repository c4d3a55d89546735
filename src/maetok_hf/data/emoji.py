"""The emoji of the npm package `emoji-datasource-google` as a local colour data set of 64 x 64 pixels."""

import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..seeding import keyed_generator


SIZE = 64
_IMAGES = f"img/google/{SIZE}/"
_DESCRIPTIONS = ("package.json", "emoji.json")
_FIX = "get the package with `npm pack emoji-datasource-google` and pass the .tgz file or the unpacked folder."

_CARD = """---
pretty_name: Emoji at 64 x 64
license: apache-2.0
task_categories:
- unconditional-image-generation
- image-classification
---
# Emoji at {size} x {size}

{num_images} emoji of Google's Noto font (Apache-2.0) from version {version} of the npm package
`emoji-datasource-google`, on white. The class is the package's category.

Emoji are split by what they show: all skin tones of an emoji are in the same split, and so are emoji with the same
picture, such as the flags of France and Saint Martin. Of these groups, `validation` holds a random share of {share:g}
of each class; `train` holds the others. Emoji that differ in sex or hair only are different groups: nearly the same
picture can be in both splits.

| class | train | validation |
| --- | --- | --- |
{table}

Made by `maetok_hf.data.export_emoji(seed={seed}, validation_share={share:g}, num_shards={num_shards})`.
"""


@dataclass(frozen=True)
class _Emoji:
    name: str  # of its file
    label: int
    image: PIL.Image.Image


def _read_archive(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.partition("/")[2]  # the archive has one folder, `package`
                if member.isfile() and (name in _DESCRIPTIONS or name.startswith(_IMAGES)):
                    files[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"`package={str(path)!r}` cannot be read as a .tgz archive ({error}): {_FIX}") from error
    return files


def _read_package(path: Path) -> dict[str, bytes]:
    """The files that are needed, by their names in the package."""
    if path.is_dir():
        names = [*_DESCRIPTIONS, *(_IMAGES + file.name for file in path.glob(f"{_IMAGES}*.png"))]
        files = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    elif path.is_file():
        files = _read_archive(path)
    else:
        raise ValueError(f"`package={str(path)!r}` does not exist: {_FIX}")
    missing = [name for name in _DESCRIPTIONS if name not in files]
    if missing:
        raise ValueError(f"`package={str(path)!r}` has no {' and no '.join(missing)}: {_FIX}")
    return files


def _on_white(name: str, content: bytes) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(content)).convert("RGBA")
    if image.size != (SIZE, SIZE):
        raise ValueError(f"{name} has {image.width} x {image.height} pixels instead of {SIZE} x {SIZE}.")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _read_emoji(files: Mapping[str, bytes]) -> tuple[list[list[_Emoji]], list[str]]:
    """For each base emoji its picture and those of its skin tones; and the names of the classes."""
    table = sorted(json.loads(files["emoji.json"]), key=lambda entry: entry["unified"])
    classes = sorted({entry["category"] for entry in table})
    result, missing = [], []
    for entry in table:
        variants = [entry, *entry.get("skin_variations", {}).values()]
        names = [variant["image"] for variant in variants if variant["has_img_google"]]
        missing += [name for name in names if _IMAGES + name not in files]
        present = [name for name in names if _IMAGES + name in files]
        label = classes.index(entry["category"])
        result.append([_Emoji(name, label, _on_white(name, files[_IMAGES + name])) for name in present])
    if missing:
        raise ValueError(
            f"`package` lacks {len(missing)} images that its emoji.json names, such as {_IMAGES}{missing[0]}: {_FIX}"
        )
    return result, classes


def _group(emoji: list[list[_Emoji]]) -> list[list[_Emoji]]:
    """Lists of pictures that belong together, those with a picture in common joined."""
    groups: dict[bytes, list[_Emoji]] = {}
    for group in emoji:
        pixels = [picture.image.tobytes() for picture in group]
        same = {id(groups[key]): groups[key] for key in pixels if key in groups}
        joined = [picture for other in (*same.values(), group) for picture in other]
        groups |= dict.fromkeys((picture.image.tobytes() for picture in joined), joined)
    return list({id(group): group for group in groups.values()}.values())


def _split(groups: list[list[_Emoji]], num_classes: int, share: float, seed: int) -> dict[str, list[_Emoji]]:
    splits: dict[str, list[_Emoji]] = {"train": [], "validation": []}
    for label in range(num_classes):
        of_class = [group for group in groups if group[0].label == label]
        # every class is in both splits, unless it has one group only
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        order = torch.randperm(len(of_class), generator=keyed_generator(seed, "emoji split", label)).tolist()
        for position, index in enumerate(order):
            splits["validation" if position < count else "train"] += of_class[index]
    for split, pictures in splits.items():
        order = torch.randperm(len(pictures), generator=keyed_generator(seed, f"emoji order {split}")).tolist()
        splits[split] = [pictures[index] for index in order]
    return splits


def _encode(picture: _Emoji) -> dict[str, Any]:
    file = io.BytesIO()
    picture.image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": picture.name}


def _write_split(folder: Path, split: str, pictures: list[_Emoji], num_shards: int, features: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(num_shards):
        part = pictures[len(pictures) * shard // num_shards : len(pictures) * (shard + 1) // num_shards]
        columns = {"image": [_encode(picture) for picture in part], "label": [picture.label for picture in part]}
        table = pa.table(columns, schema=features.arrow_schema)
        pq.write_table(table, folder / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet", row_group_size=64)


def _table(splits: Mapping[str, list[_Emoji]], classes: list[str]) -> str:
    rows = []
    for label, name in enumerate(classes):
        counts = [sum(picture.label == label for picture in pictures) for pictures in splits.values()]
        rows.append(f"| {name} | {counts[0]} | {counts[1]} |")
    totals = " | ".join(str(len(pictures)) for pictures in splits.values())
    return "\n".join([*rows, f"| all | {totals} |"])


def export_emoji(
    package: str | os.PathLike,
    output_dir: str | os.PathLike,
    seed: int = 0,
    validation_share: float = 0.1,
    num_shards: int = 8,
) -> Path:
    """
    Write the emoji of the npm package `emoji-datasource-google` as a data set that
    `datasets.load_dataset(output_dir, streaming=True)` and [`open_images`] read: 64 x 64 RGB PNG files on white in
    parquet shards, with an `Image` column `image`, a `ClassLabel` column `label`, the package's category, and the
    splits `train` and `validation`. Skin tones of an emoji, and emoji with the same picture, are in one split. The
    split and the order of the rows are drawn from `seed`. A folder that already holds this export is left as it is.

    Args:
        package (`str` or `os.PathLike`): What `npm pack emoji-datasource-google` fetches (a .tgz file), or a folder
            with its content.
        output_dir (`str` or `os.PathLike`): Folder to create. It appears only when it is complete.
        seed (`int`, *optional*, defaults to 0): Seed of the split and the order.
        validation_share (`float`, *optional*, defaults to 0.1): Share of the emoji of each class, counted without
            their skin tones, that are held out; at least one.
        num_shards (`int`, *optional*, defaults to 8): Number of files of `train`.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        ValueError: If the package is not there or incomplete, a setting is out of range, or `output_dir` exists and
            holds something else.
    """
    from datasets import ClassLabel, Features, Image

    if isinstance(num_shards, bool) or not isinstance(num_shards, int) or num_shards < 1:
        raise ValueError(f"`num_shards` must be an integer of at least 1, got {num_shards!r}.")
    if not 0 < validation_share < 1:
        raise ValueError(f"`validation_share` must lie between 0 and 1, got {validation_share!r}.")
    output_dir = Path(output_dir)
    files = _read_package(Path(package))
    emoji, classes = _read_emoji(files)
    splits = _split(_group(emoji), len(classes), validation_share, seed)
    if num_shards > len(splits["train"]):
        raise ValueError(
            f"`num_shards` must be at most {len(splits['train'])}, the training images, got {num_shards}."
        )
    card = _CARD.format(
        size=SIZE,
        num_images=sum(map(len, splits.values())),
        version=json.loads(files["package.json"])["version"],
        share=validation_share,
        table=_table(splits, classes),
        seed=seed,
        num_shards=num_shards,
    )
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if (output_dir / "README.md").is_file() and (output_dir / "README.md").read_text() == card:
            return output_dir
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` exists and is not the export of this package with seed {seed}, share "
            f"{validation_share:g} and {num_shards} shards: remove it or choose another folder."
        )

    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        (temporary / "data").mkdir()
        for split, shards in (("train", num_shards), ("validation", 1)):
            _write_split(temporary / "data", split, splits[split], shards, features)
        (temporary / "README.md").write_text(card)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, output_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return output_dir
