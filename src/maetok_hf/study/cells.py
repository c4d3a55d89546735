"""A cell of the study: one tokenizer of one seed, the commands that train it and its generator, and its identity."""

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..training.recipes import load_recipe, parse_arguments, recipe_to_dict
from ..training.run_options import SiTRunOptions, TokenizerRunOptions
from ..training.sit_recipe import SiTRecipe
from ..training.tokenizer_recipe import TokenizerRecipe
from .presets import Preset
from .variants import VARIANTS, Variant


# Folder in which commands are written down, wherever they ran: records must not tell places, and a cell is the same
# cell in another folder.
RECORDED_ROOT = Path("outputs/study")
FORMAT = 1
# Checkpoints of a training that are kept: those at which it is measured, and those of stopped runs.
CHECKPOINTS_LIMIT = 20
TOKENIZER_CHECKPOINTS = 1000


class Stage(NamedTuple):
    """
    A command of a cell.

    Args:
        name (`str`): `"tokenizer"`, `"latents"` or `"generator"`, also the name of its folder.
        script (`str`): The script in `examples`.
        words (`list[str]`): Its flags.
    """

    name: str
    script: str
    words: list[str]

    def arguments(self, num_threads: int) -> list[str]:
        """
        The flags, and a data worker beside the threads that compute. It decodes the next images, and these and their
        order stay the same: it is no part of the cell's identity.

        Args:
            num_threads (`int`): CPU threads.

        Returns:
            `list[str]`: Words after the script.
        """
        return [*self.words, "--dataloader_num_workers", "1" if num_threads > 1 else "0"]

    def command(self, num_threads: int) -> str:
        """
        The line to type.

        Args:
            num_threads (`int`): CPU threads.

        Returns:
            `str`: With a path of the script relative to the project.
        """
        return shlex.join(
            ["accelerate", *launch_words(num_threads), f"examples/{self.script}", *self.arguments(num_threads)]
        )


def launch_words(num_threads: int) -> list[str]:
    """
    How `accelerate` starts one process, whatever `accelerate config` has set on the machine.

    Args:
        num_threads (`int`): CPU threads.

    Returns:
        `list[str]`: Words between `accelerate` and the script.
    """
    return [
        *("launch", "--num_processes", "1", "--num_cpu_threads_per_process", str(num_threads)),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ]


@dataclass(frozen=True)
class Cell:
    """
    One tokenizer of one seed.

    Args:
        preset ([`Preset`]): The study.
        variant ([`Variant`]): The tokenizer.
        seed (`int`): Seed of all its trainings.
        recipes (`Path`): Folder of the recipes.
    """

    preset: Preset
    variant: Variant
    seed: int
    recipes: Path

    @property
    def name(self) -> str:
        """`str`: For its files."""
        return f"{self.preset.name}-{self.variant.name}-seed{self.seed}"

    @property
    def base(self) -> "Cell | None":
        """`Cell`, *optional*: The cell whose decoder is fine-tuned here."""
        if self.variant.base is None:
            return None
        return Cell(self.preset, VARIANTS[self.variant.base], self.seed, self.recipes)

    def folder(self, root: Path) -> Path:
        """Its folder in that of all studies."""
        return self.data(root).parent / f"{self.variant.name}-seed{self.seed}"

    def data(self, root: Path) -> Path:
        """The folder of the images."""
        return root / self.preset.name / "data"

    def tokenizer(self, root: Path) -> Path:
        """The folder of its tokenizer."""
        return self.folder(root) / "tokenizer"

    def generator(self, root: Path) -> Path:
        """The folder of its generator, which is that of its base."""
        return (self.base or self).folder(root) / "generator"

    def stages(self, root: Path) -> list[Stage]:
        """
        What is run for this cell alone; a base has stages of its own.

        Args:
            root (`Path`): The folder of all studies.

        Returns:
            `list[Stage]`: In order.
        """
        stages = [self._tokenizer_stage(root)]
        if self.variant.has_generator and self.base is None:
            stages += [self._latents_stage(root), self._generator_stage(root)]
        return stages

    def _tokenizer_stage(self, root: Path) -> Stage:
        preset, budget = self.preset, self.preset.budget
        if self.base is None:
            sizes = (preset.resolution, preset.second_resolution)
            recipe, steps = preset.tokenizer_recipe, budget.tokenizer_steps
            own = self.variant.flags(preset.image_token_channels, sizes)
        else:
            recipe, steps = preset.decoder_recipe, budget.finetuning_steps
            own = ["--pretrained_model_name_or_path", str(self.base.tokenizer(root))]
        words = self._training_words(recipe, steps, own, "tokenizer", root)
        words += ["--dataset_name", str(self.data(root)), "--checkpointing_steps", str(TOKENIZER_CHECKPOINTS)]
        return Stage("tokenizer", "train_maetok.py", words)

    def _latents_stage(self, root: Path) -> Stage:
        words = [
            *("--tokenizer_name_or_path", str(self.tokenizer(root)), "--dataset_name", str(self.data(root))),
            *("--resolution", str(self.preset.resolution), "--random_flip", "false"),
            *("--output_dir", str(self.folder(root) / "latents")),
        ]
        return Stage("latents", "cache_latents.py", words)

    def _generator_stage(self, root: Path) -> Stage:
        budget, folder = self.preset.budget, self.folder(root)
        own = [
            "--tokenizer_name_or_path",
            str(self.tokenizer(root)),
            "--latents_name_or_path",
            str(folder / "latents"),
        ]
        words = self._training_words(self.preset.generator_recipe, budget.generator_steps, own, "generator", root)
        words += ["--checkpointing_steps", str(max(1, budget.generator_steps // 4))]
        words += ["--checkpoints_total_limit", str(CHECKPOINTS_LIMIT)]
        return Stage("generator", "train_sit.py", words)

    def _training_words(self, recipe: str, steps: int, own: list[str], name: str, root: Path) -> list[str]:
        words = ["--recipe", recipe, *own, "--max_train_steps", str(steps)]
        recipe_class = SiTRecipe if name == "generator" else TokenizerRecipe
        warmup = load_recipe(recipe_class, self.recipes / f"{recipe}.yaml").lr_warmup_steps
        if steps <= warmup:  # to try out the machinery: a cosine that is all warm-up is refused
            words += ["--lr_warmup_steps", "0"]
        if self.preset.precision != "no":
            words += ["--mixed_precision", self.preset.precision]
        return [*words, "--seed", str(self.seed), "--output_dir", str(self.folder(root) / name), "--report_to", "none"]

    def recipe_of(self, stage: Stage) -> dict[str, Any] | None:
        """
        What a training command trains with: the recipe's file with the command's flags, read as the script reads it.

        Args:
            stage ([`Stage`]): One of this cell's.

        Returns:
            `dict[str, Any]`, *optional*: All settings in plain types; `None` for a stage that trains nothing.
        """
        classes = {
            "train_maetok.py": (TokenizerRecipe, TokenizerRunOptions),
            "train_sit.py": (SiTRecipe, SiTRunOptions),
        }
        if stage.script not in classes:
            return None
        parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False)
        recipe, _ = parse_arguments(parser, *classes[stage.script], self.recipes, stage.words)
        return recipe_to_dict(recipe)

    def settings(self) -> dict[str, Any]:
        """Commands and recipes of this cell alone, in plain types; a change of any makes another cell of it."""
        stages = self.stages(RECORDED_ROOT)
        return {
            "stages": {stage.name: [stage.script, *stage.words] for stage in stages},
            "recipes": {stage.name: self.recipe_of(stage) for stage in stages},
        }

    def identity(self, data: str, classifier: str) -> dict[str, Any]:
        """
        What its numbers depend on besides the machine.

        Args:
            data (`str`): Digest of the images.
            classifier (`str`): Digest of the classifier in whose features distances are measured.

        Returns:
            `dict[str, Any]`: Plain types.
        """
        identity = {
            "format": FORMAT,
            "preset": self.preset.name,
            "variant": self.variant.name,
            "seed": self.seed,
            "data": data,
            "classifier": classifier,
            "measures": self.preset.budget.measures(),
            **self.settings(),
        }
        if self.base is not None:
            identity["base"] = self.base.settings()
        return identity

    def commands(self, num_threads: int) -> list[str]:
        """
        Everything that was run for it.

        Args:
            num_threads (`int`): CPU threads.

        Returns:
            `list[str]`: Lines to type, with the usual folders, those of the base first.
        """
        stages = [*(self.base.stages(RECORDED_ROOT) if self.base else []), *self.stages(RECORDED_ROOT)]
        return [stage.command(num_threads) for stage in stages]

    def estimated_seconds(self) -> dict[str, float]:
        """
        Seconds that its own stages and its measures are expected to take, by the preset's rates.

        Returns:
            `dict[str, float]`: By name of the stage, and `"measures"`.
        """
        rates, budget = self.preset.seconds, self.preset.budget
        found = {}
        for stage in self.stages(RECORDED_ROOT):
            training = {"latents": 0.0, "generator": rates["generator"] * budget.generator_steps}
            training["tokenizer"] = rates["tokenizer"] * budget.tokenizer_steps
            if self.base is not None:
                training["tokenizer"] = rates["finetuning"] * budget.finetuning_steps
            found[stage.name] = training[stage.name] + rates["launch"]
        samples = 0
        if self.variant.has_generator:
            samples = budget.num_samples
        if any(stage.name == "generator" for stage in self.stages(RECORDED_ROOT)):
            samples += budget.num_curve_samples * len(budget.curve_steps())
        found["measures"] = rates["measures"] + rates["sample"] * samples
        return found


def make_cells(preset: Preset, variants: list[str], seeds: list[int], recipes: Path) -> list[Cell]:
    """
    The cells of a study, seed by seed, so that an interrupted one has whole seeds.

    Args:
        preset ([`Preset`]): The study.
        variants (`list[str]`): Names of the tokenizers.
        seeds (`list[int]`): Seeds.
        recipes (`Path`): Folder of the recipes.

    Returns:
        `list[Cell]`: A base before what is fine-tuned from it.
    """
    ordered = [variant for variant in VARIANTS.values() if variant.name in variants]
    return [Cell(preset, variant, seed, recipes) for seed in seeds for variant in ordered]
