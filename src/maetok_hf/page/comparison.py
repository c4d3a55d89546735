"""A blind comparison of two pipelines: pairs of images of the same class and seed, on sides of a keyed draw.

This is the form of the paper's human study: a person sees both images, does not know which pipeline made which, and
says which one is better, or that neither is. Everything that is drawn follows from the seed of the comparison.
"""

import csv
import io
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..pipelines import MAETokDiffusionPipeline
from ..seeding import keyed_generator
from .abilities import SCHEMES, classes_of, schemes_of, solvers_of
from .generation import MAX_SEED, GenerationSettings


LEFT, TIE, RIGHT = "left", "tie", "right"
VOTES = (LEFT, TIE, RIGHT)
RANDOM_CLASS = -2  # drawn anew for every pair
RESULTS = ("wins", "ties", "losses")


def check_comparable(first: MAETokDiffusionPipeline, second: MAETokDiffusionPipeline) -> None:
    """
    Two pipelines must know the same classes.

    Args:
        first ([`MAETokDiffusionPipeline`]): One pipeline.
        second ([`MAETokDiffusionPipeline`]): The other.

    Raises:
        ValueError: If they do not.
    """
    numbers = [pipe.transformer.config.num_classes for pipe in (first, second)]
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"the two pipelines have {numbers[0]} and {numbers[1]} classes: only pipelines of the same classes can be "
            "compared."
        )
    names = [pipe.id2label for pipe in (first, second)]
    if None not in names and names[0] != names[1]:
        different = next(index for index in range(numbers[0]) if names[0].get(index) != names[1].get(index))
        raise ValueError(
            f"class {different} is {names[0].get(different)!r} in one pipeline and {names[1].get(different)!r} in the "
            "other: only pipelines of the same classes can be compared."
        )


def common_classes(first: MAETokDiffusionPipeline, second: MAETokDiffusionPipeline) -> dict[int, str]:
    """
    What both can be asked for.

    Args:
        first ([`MAETokDiffusionPipeline`]): One pipeline.
        second ([`MAETokDiffusionPipeline`]): The other.

    Returns:
        `dict[int, str]`: Names by class index, as [`~maetok_hf.page.abilities.classes_of`] has them.
    """
    named, other = (second, first) if first.id2label is None else (first, second)
    return {index: name for index, name in classes_of(named).items() if index in classes_of(other)}


def common_schemes(first: MAETokDiffusionPipeline, second: MAETokDiffusionPipeline) -> list[str]:
    """
    Schemes of guidance that both have.

    Args:
        first ([`MAETokDiffusionPipeline`]): One pipeline.
        second ([`MAETokDiffusionPipeline`]): The other.

    Returns:
        `list[str]`: Some of `SCHEMES`.
    """
    return [scheme for scheme in SCHEMES if scheme in schemes_of(first) and scheme in schemes_of(second)]


def common_solvers(first: MAETokDiffusionPipeline, second: MAETokDiffusionPipeline) -> dict[str, str]:
    """
    Solvers that both can sample with, their own ones first.

    Args:
        first ([`MAETokDiffusionPipeline`]): One pipeline.
        second ([`MAETokDiffusionPipeline`]): The other.

    Returns:
        `dict[str, str]`: What they are called by name.
    """
    both = [name for name in solvers_of(first) if name in solvers_of(second)]
    return {name: solvers_of(first)[name] for name in both} | {both[0]: "each pipeline's own"}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """
    Two images of the same class and seed.

    Args:
        number (`int`): Place in the comparison, from 0.
        comparison_seed (`int`): What the class, if it was drawn, the sides and the seed of the images follow from.
        settings ([`GenerationSettings`]): How both were made.
        class_name (`str`): Name of their class.
        first_is_left (`bool`): Whether the first pipeline's image is on the left side.
        vote (`str`, *optional*): One of `VOTES`.
    """

    number: int
    comparison_seed: int
    settings: GenerationSettings
    class_name: str
    first_is_left: bool
    vote: str | None = None

    @property
    def result(self) -> str | None:
        """`str`: What the vote means for the first pipeline, one of `RESULTS`, or `None` before it."""
        if self.vote is None:
            return None
        if self.vote == TIE:
            return "ties"
        return "wins" if (self.vote == LEFT) == self.first_is_left else "losses"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    A comparison so far. It is never changed: each step makes a new one.

    Args:
        names (`tuple[str, str]`): Folders or Hub repositories of the two pipelines.
        revisions (`tuple[str | None, str | None]`, *optional*): Their revisions.
        pairs (`tuple[Pair, ...]`, *optional*): The pairs that were shown; only the last one may be without a vote.
    """

    names: tuple[str, str]
    revisions: tuple[str | None, str | None] = (None, None)
    pairs: tuple[Pair, ...] = ()

    @property
    def labels(self) -> tuple[str, str]:
        """`tuple[str, str]`: What the two are called on the page, told apart by their revisions."""
        pairs = zip(self.names, self.revisions, strict=True)
        first, second = (name if revision is None else f"{name} @ {revision}" for name, revision in pairs)
        return (first, second) if first != second else (f"{first} (first)", f"{second} (second)")

    @property
    def waits_for_vote(self) -> bool:
        """`bool`: Whether there is a pair without a vote."""
        return bool(self.pairs) and self.pairs[-1].vote is None

    @property
    def tally(self) -> dict[str, int]:
        """`dict[str, int]`: How many votes the first pipeline won, tied and lost."""
        results = [pair.result for pair in self.pairs]
        return {result: results.count(result) for result in RESULTS}

    def next_pair(self, settings: GenerationSettings, classes: dict[int, str]) -> "Comparison":
        """
        Draw a pair.

        Args:
            settings ([`GenerationSettings`]): How both images shall be made. Its seed is that of the comparison; its
                class may be `RANDOM_CLASS`.
            classes (`dict[int, str]`): What may be asked for, from [`common_classes`].

        Returns:
            [`Comparison`]: With a new last pair, whose images have the seed of the comparison plus its number.

        Raises:
            ValueError: If the last pair has no vote, the class is unknown, or the seed becomes too large.
        """
        if self.waits_for_vote:
            raise ValueError("This pair has no vote yet: say which image is better, or that it is a tie.")
        number, seed, index = len(self.pairs), settings.seed, settings.class_index
        if index == RANDOM_CLASS:
            known = [index for index in classes if index >= 0]
            index = known[torch.randint(len(known), (), generator=keyed_generator(seed, "pair class", number))]
        if index not in classes:
            raise ValueError(f"These pipelines have no class {index!r} in common: choose one of the list.")
        if seed + number > MAX_SEED:
            raise ValueError(f"The seed of this pair would be above {MAX_SEED}: choose a smaller seed.")
        first_is_left = bool(torch.randint(2, (), generator=keyed_generator(seed, "pair sides", number)))
        pair = Pair(
            number=number,
            comparison_seed=seed,
            settings=replace(settings, class_index=index, seed=seed + number, num_images=1),
            class_name=classes[index],
            first_is_left=first_is_left,
        )
        return replace(self, pairs=(*self.pairs, pair))

    def vote(self, vote: str) -> "Comparison":
        """
        Say which side is better.

        Args:
            vote (`str`): One of `VOTES`.

        Returns:
            [`Comparison`]: With the vote for the last pair.

        Raises:
            ValueError: If there is no pair that waits for it, or it is none of these.
        """
        if vote not in VOTES:
            raise ValueError(f"A vote must be one of {', '.join(VOTES)}, got {vote!r}.")
        if not self.waits_for_vote:
            raise ValueError("This pair has a vote already: ask for the next pair.")
        return replace(self, pairs=(*self.pairs[:-1], replace(self.pairs[-1], vote=vote)))

    def rows(self) -> list[dict[str, Any]]:
        """
        The pairs that have a vote, for a table.

        Returns:
            `list[dict[str, Any]]`: Plain values by name.
        """
        rows = []
        for pair in self.pairs:
            if pair.vote is None:
                continue
            first, second = self.names
            left, right = (first, second) if pair.first_is_left else (second, first)
            settings = pair.settings
            guided = settings.is_guided
            rows.append(
                {
                    "pair": pair.number,
                    "comparison_seed": pair.comparison_seed,
                    "class": settings.class_index,
                    "class_name": pair.class_name,
                    "seed": settings.seed,
                    "left": left,
                    "right": right,
                    "left_is_first": pair.first_is_left,
                    "vote": pair.vote,
                    "first": {"wins": "win", "ties": "tie", "losses": "loss"}[pair.result],
                    "num_inference_steps": settings.num_inference_steps,
                    "solver": settings.solver,
                    "guidance": settings.scheme if guided else "none",
                    "guidance_scale": settings.scale if guided else 1.0,
                    "guidance_low": settings.interval[0] if guided else None,
                    "guidance_high": settings.interval[1] if guided else None,
                }
            )
        return rows

    def to_dict(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: The pipelines, the tally of the first one, and [`~Comparison.rows`], for a JSON file.
        """
        pipelines = [
            {"pretrained_model_name_or_path": name, "revision": revision}
            for name, revision in zip(self.names, self.revisions, strict=True)
        ]
        return {"first": pipelines[0], "second": pipelines[1], "tally_of_first": self.tally, "pairs": self.rows()}

    def to_csv(self) -> str:
        """
        Returns:
            `str`: [`~Comparison.rows`] as lines of comma-separated values with a head; empty without votes.
        """
        rows = self.rows()
        if not rows:
            return ""
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()
