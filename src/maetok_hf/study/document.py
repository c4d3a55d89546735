"""The document of a study: tables, verdicts and pictures of its records. What was written by hand is kept."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.checkpointing import write_text
from .pictures import draw_pictures
from .presets import Preset
from .records import machine_line
from .summaries import CLAIMS, Measure, Record, interval, make_measures, values_of, verdict
from .variants import VARIANTS, Variant


HAND_BEGIN = "<!-- written by hand from here on: kept when this file is written anew -->"
HAND_END = "<!-- written by hand up to here -->"
NO_CAUSES = "Nothing has been written here yet."
COMPARED = ("rfd", "psnr", "probe", "nll", "loss", "gaussian", "ratio", "gfd", "recognition")
LATENTS = ("dimensions", "own_nll", "explained", "variance", "rank")
POSITIONS = ("rfd", "psnr", "second_rfd", "second_psnr")


def write_document(results: Path, preset: Preset, records: Sequence[Record]) -> Path | None:
    """
    Write the document and its pictures.

    Args:
        results (`Path`): Folder of the document; pictures and records are in `study` there.
        preset ([`Preset`]): The study.
        records (`Sequence[Mapping[str, Any]]`): Records of its cells.

    Returns:
        `Path`, *optional*: The document; `None` if there is no record yet.

    Raises:
        ValueError: If records were measured with different images, classifiers or settings.
    """
    if not records:
        return None
    check_comparable(records)
    results.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(results / "study", preset.name, records, preset.budget.mixture_size)
    path = results / preset.document
    known = results / "study" / "cells" / f"{preset.name}-classifier.json"
    classifier = json.loads(known.read_text(encoding="utf-8")) if known.is_file() else None
    text = to_markdown(preset, records, pictures, classifier, hand_written(path))
    write_text(path, text)
    return path


def check_comparable(records: Sequence[Record]) -> None:
    """
    Args:
        records (`Sequence[Mapping[str, Any]]`): Records of cells.

    Raises:
        ValueError: If they were measured with different images, classifiers or settings.
    """
    for name in ("data", "classifier", "measures"):
        kinds: dict[str, list[str]] = {}
        for record in records:
            identity = record["identity"]
            kind = json.dumps(identity[name], sort_keys=True)
            kinds.setdefault(kind, []).append(f"{identity['variant']}-seed{identity['seed']}")
        if len(kinds) > 1:
            examples = " and ".join(cells[0] for cells in kinds.values())
            raise ValueError(
                f"Records differ in {name!r}, such as {examples}, so that they cannot be compared: remove those that "
                "do not belong."
            )


def hand_written(path: Path) -> str:
    """
    What was written by hand into an earlier document.

    Args:
        path (`Path`): The document.

    Returns:
        `str`: The text between the two marks.

    Raises:
        ValueError: If there is a document without them, which would be lost.
    """
    if not path.is_file():
        return NO_CAUSES
    before, begin, rest = path.read_text(encoding="utf-8").partition(HAND_BEGIN)
    text, end, _ = rest.partition(HAND_END)
    if not begin or not end:
        raise ValueError(f"{path} lacks the marks {HAND_BEGIN!r} and {HAND_END!r} around what is kept: put them back.")
    return text.strip("\n")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, and an empty one."""
    return [*("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)), ""]


def _entry(records: Sequence[Record], variant: Variant, measure: Measure) -> str:
    values = values_of(records, variant.name, measure)
    return interval(values).text(measure.digits) if values else ""


def _present(records: Sequence[Record]) -> list[Variant]:
    found = {record["identity"]["variant"] for record in records}
    return [variant for variant in VARIANTS.values() if variant.name in found]


def _seeds(records: Sequence[Record], variant: Variant) -> int:
    return sum(record["identity"]["variant"] == variant.name for record in records)


def _rows(records: Sequence[Record], variants: Sequence[Variant], measures: Sequence[Measure]) -> list[list[str]]:
    return [
        [
            variant.title,
            str(_seeds(records, variant)),
            *(_entry(records, variant, measure) for measure in measures),
        ]
        for variant in variants
    ]


def to_markdown(
    preset: Preset,
    records: Sequence[Record],
    pictures: dict[str, str],
    classifier: dict[str, Any] | None,
    causes: str,
) -> str:
    """
    The document.

    Args:
        preset ([`Preset`]): The study.
        records (`Sequence[Mapping[str, Any]]`): Records of its cells.
        pictures (`dict[str, str]`): Names of picture files, from [`draw_pictures`].
        classifier (`dict[str, Any]`, *optional*): What is known of the classifier.
        causes (`str`): What was written by hand.

    Returns:
        `str`: Markdown.
    """
    measures = make_measures(preset.budget.mixture_size)
    titles = {name: measure.title.format(classifier=preset.classifier) for name, measure in measures.items()}
    orderings = titles | {"ratio": "SiT loss / that of a Gaussian"}
    present = _present(records)
    generators = [variant for variant in present if variant.has_generator]
    lines = [
        "# Latent spaces of tokenizers, and what diffusion models learn on them",
        "",
        f"The comparison of the MAETok paper on {preset.data}. Written by `python examples/study_latents.py --preset "
        f"{preset.name}` from [the records of its cells](study/cells), which hold every number, command and time; "
        "only the section on causes is written by hand. Numbers are means and 95 % t-intervals over seeds; all "
        "tokenizers have the same budget, and all generators, too.",
        "",
    ]
    if generators:
        head = ["tokenizer", "seeds", *(titles[name] for name in COMPARED)]
        lines += table(head, _rows(records, generators, [measures[name] for name in COMPARED]))
        lines += [*_notes(preset), ""]
    lines += ["## Orderings of the paper", "", *_orderings(records, measures, orderings)]
    lines += [*_factors(records, present, measures, titles), *_positions(preset, records, present, measures, titles)]
    if generators:
        lines += [*_latents(preset, records, generators, measures, titles), *_pictures(preset, records, pictures)]
    lines += ["## Causes", "", HAND_BEGIN, "", causes.strip("\n"), "", HAND_END, ""]
    lines += _protocol(preset, records, classifier)
    return "\n".join(lines).rstrip("\n") + "\n"


def _notes(preset: Preset) -> list[str]:
    return [
        f"rFD and gFD are Fréchet distances in the 64 features of the {preset.classifier}, which was trained on the "
        "real training images: they compare within this table, not with an FID. rFD is between reconstructions of "
        "held-out images and these images; gFD between generated images, without guidance, and the training images. "
        "MAETok here has masks and the HOG target: its teachers DINOv2 and SigLIP are not at hand offline, so its "
        "counterpart in the paper is the row of HOG alone. Decoder fine-tuning comes on top of its budget and leaves "
        "latents and generator as they are, bit for bit.",
        "",
        "The SiT loss is the held-out velocity loss of the moving average, with the class, per number of a latent. "
        "All latents have equally many numbers, of mean 0 and variance 1 altogether. Part of that variance may be "
        "constants that differ from token to token, and the rest may lie in few directions: either makes a low loss. "
        "The loss of a Gaussian is what a perfect generator would have if the latents were Gaussian with the same "
        "mean and covariance, (π / 2) times the mean root of its eigenvalues. The ratio of the two, which neither "
        "scale nor constants change as much, is the fairer comparison.",
    ]


def _orderings(records: Sequence[Record], measures: dict[str, Measure], titles: dict[str, str]) -> list[str]:
    rows, missing = [], 0
    for claim in CLAIMS:
        found = verdict(records, claim, measures[claim.measure])
        if found is None:
            missing += 1
            continue
        word, difference = found
        name = titles[claim.measure] + (", second resolution" if claim.measure.startswith("second") else "")
        rows.append(
            [
                f"{VARIANTS[claim.better].title} better than {VARIANTS[claim.worse].title}",
                name,
                claim.source,
                difference.text(measures[claim.measure].digits),
                word,
            ]
        )
    lines = [
        "`yes` and `no` where the 95 % interval of the difference of the two means (over seeds; Welch's, and paired "
        "by seeds where one tokenizer is the fine-tuning of the other) leaves 0 out: `yes` in the paper's direction, "
        "`no` in the other one. Each interval is of its own: of twenty orderings one would be resolved by chance if "
        "nothing differed.",
        "",
        *table(["ordering", "measure", "paper", "difference here", "appears here"], rows),
    ]
    if missing:
        lines += [f"{missing} further orderings need cells of `--full` that are not there yet.", ""]
    return lines


def _factors(
    records: Sequence[Record], present: Sequence[Variant], measures: dict[str, Measure], titles: dict[str, str]
) -> list[str]:
    found = {variant.factors: variant for variant in present if variant.factors is not None}
    if len(found) < 4:
        return []
    names = ("rfd", "psnr", "probe", "nll", "ratio", "gfd")
    rows = []
    for factors in sorted(found, reverse=True):
        variant = found[factors]
        published = ["" if value is None else f"{value:g}" for value in variant.published]
        marks = ["yes" if factor else "no" for factor in factors]
        rows.append([*marks, *(_entry(records, variant, measures[name]) for name in names), " / ".join(published)])
    head = ["masks", "learnable tokens", "targets", *(titles[name] for name in names), "paper: rFID / gFID"]
    return [
        "## Masks x learnable tokens x targets",
        "",
        "The paper's numbers are of ImageNet, with all targets where targets are on, except of masks with learnable "
        "tokens: there it is the gFID of HOG alone. Image tokens here have half the channels and twice the number, so "
        "that latents have equally many numbers.",
        "",
        *table(head, rows),
    ]


def _positions(
    preset: Preset,
    records: Sequence[Record],
    present: Sequence[Variant],
    measures: dict[str, Measure],
    titles: dict[str, str],
) -> list[str]:
    compared = [variant for variant in present if variant.positions is not None]
    if not compared:
        return []
    sizes = (preset.resolution, preset.second_resolution)
    head = [f"{titles[name]} at {sizes[name.startswith('second')]}" for name in POSITIONS]
    rows = _rows(records, compared, [measures[name] for name in POSITIONS])
    return [
        "## Positions at a second resolution",
        "",
        f"Trained on images of {sizes[0]} and {sizes[1]} pixels in turn. At {sizes[1]} the {preset.classifier} sees "
        f"images and reconstructions reduced to {sizes[0]}.",
        "",
        *table(["positions", "seeds", *head], rows),
    ]


def _latents(
    preset: Preset,
    records: Sequence[Record],
    variants: Sequence[Variant],
    measures: dict[str, Measure],
    titles: dict[str, str],
) -> list[str]:
    budget = preset.budget
    titles = titles | {
        "explained": f"variance in {budget.mixture_dimensions} dimensions (%)",
        "dimensions": "dimensions of more than 90 % of the variance",
        "own_nll": f"GMM NLL in these, {budget.mixture_size} components",
    }
    return [
        "## Latent spaces",
        "",
        "The likelihood in the first table is in the same number of standardised principal components for all "
        f"tokenizers, {budget.mixture_dimensions}. The paper takes the smallest number with more than 90 % of each "
        "one's variance. A density of more dimensions has more nats for one and the same shape, so that those numbers "
        "differ mostly by the dimensions:",
        "",
        *table(
            ["tokenizer", "seeds", *(titles[name] for name in LATENTS)],
            _rows(records, variants, [measures[name] for name in LATENTS]),
        ),
    ]


def _pictures(preset: Preset, records: Sequence[Record], pictures: dict[str, str]) -> list[str]:
    captions = {
        "modes": "Like Figure 2 of the paper: held-out likelihood of mixtures, and held-out loss of the generator. "
        "Lines are means over seeds, bands reach from the smallest to the largest.",
        "probe-and-distance": "Like Figure 5 of the paper: linear probe and generation at the end of training, and "
        f"generation during training (of {preset.budget.num_curve_samples} samples, which raises all distances).",
    }
    lines = ["## Pictures", ""]
    for name, file in pictures.items():
        lines += [f"![{captions[name]}](study/{file})", "", f"*{captions[name]}*", ""]
    seed = min(record["identity"]["seed"] for record in records)
    lines += [f"The first samples of seed {seed}, unselected, the same noise for all:", ""]
    for record in records:
        identity = record["identity"]
        if identity["seed"] == seed and "samples" in record["measured"]:
            title = VARIANTS[identity["variant"]].title
            file = f"{preset.name}-{identity['variant']}-seed{seed}.png"
            lines += [f"{title}:", "", f"![samples, {title}](study/cells/{file})", ""]
    return lines


def _protocol(preset: Preset, records: Sequence[Record], classifier: dict[str, Any] | None) -> list[str]:
    budget = preset.budget
    machines = dict.fromkeys(machine_line(record["machine"]) for record in records)
    seconds = sum(sum(record["seconds"].values()) for record in records)
    lines = [
        "## Protocol",
        "",
        f"- data: {preset.data}",
        f"- budget: {budget.tokenizer_steps} steps of each tokenizer, {budget.finetuning_steps} more for decoder "
        f"fine-tuning, {budget.generator_steps} of each generator; recipes `{preset.tokenizer_recipe}`, "
        f"`{preset.decoder_recipe}` and `{preset.generator_recipe}`; moving averages are measured",
        f"- samples: {budget.num_samples}, classes as frequent as in the training images, "
        f"{budget.num_inference_steps} Euler-Maruyama steps, no guidance, float32, rounded to the nearest level; "
        "precision and recall with 3 neighbours are in the records",
        f"- loss: {budget.loss_draws} times and noises for each held-out image, the same for all generators of "
        "latents of one shape",
        f"- linear probe: multinomial logistic regression to convergence on flattened latents, each feature "
        f"standardised, l2 = {budget.probe_l2:g}, chosen beforehand; accuracy on held-out images",
        f"- mixtures: diagonal, normalised, by exact EM in standardised principal components of the training latents, "
        f"mean of {len(budget.mixture_seeds)} initialisations; likelihood of held-out latents",
        "- PSNR: mean over held-out images, no mask",
    ]
    if classifier is not None:
        lines.append(
            f"- {preset.classifier}: knows {100 * classifier['held_out_accuracy']:.1f} % of held-out images; digest "
            f"{classifier['digest'][:12]}; distance of held-out to training images "
            f"{classifier['distance_of_held_out_images']:.2f}"
        )
    lines += [
        f"- time: {seconds / 60:.0f} minutes of training and measuring in all",
        *(f"- machine: {line}" for line in machines),
        "",
        "The commands of one cell; the others differ in flags that their records say:",
        "",
        "```",
        *max(records, key=lambda record: len(record["commands"]))["commands"],
        "```",
    ]
    return lines
