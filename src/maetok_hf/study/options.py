"""What the study is asked for."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .presets import PRESETS, Preset
from .variants import VARIANTS


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """
    Options of `examples/study_latents.py`.

    Args:
        preset (`str`, *optional*, defaults to `"cpu"`):
            `"cpu"`: MNIST digits of 32 x 32 pixels and the demonstration's small models; `"gpu"`: emoji of 64 x 64
            pixels, larger models and budgets.
        full (`bool`, *optional*, defaults to `False`):
            All tokenizers instead of AE, KL-VAE, MAETok and MAETok with its decoder fine-tuned.
        variants (`list[str]`, *optional*):
            Tokenizers to study, by name, instead.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`):
            Seeds of the trainings; intervals are over them.
        package (`str`, *optional*):
            What `npm pack emoji-datasource-google` fetches, for the preset `gpu`.
        output_dir (`str`, *optional*, defaults to `"outputs/study"`):
            Where data, trainings and the records of finished cells are kept.
        results_dir (`str`, *optional*, defaults to `"docs"`):
            Where the document, its pictures and the records go. A cell with a record there is not run again.
        num_threads (`int`, *optional*, defaults to 2):
            CPU threads of trainings and measures.
        dry_run (`bool`, *optional*, defaults to `False`):
            Only say what would be run, and for how long.
        report_only (`bool`, *optional*, defaults to `False`):
            Only write the document anew from the records.
        max_train_steps (`int`, *optional*):
            Cut every training short, and the samples, to try out the machinery. Needs another `results_dir`.
    """

    preset: Literal["cpu", "gpu"] = "cpu"
    full: bool = False
    variants: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    package: str | None = None
    output_dir: str = "outputs/study"
    results_dir: str = "docs"
    num_threads: int = 2
    dry_run: bool = False
    report_only: bool = False
    max_train_steps: int | None = None

    def __post_init__(self):
        for name, known in (("variants", VARIANTS), ("seeds", None)):
            values = getattr(self, name)
            unknown = [value for value in values if known is not None and value not in known]
            if unknown or len(set(values)) < len(values):
                raise ValueError(
                    f"`{name}` must name different ones"
                    + (f" of {', '.join(known)}" if known else "")
                    + f", got {', '.join(map(str, values))}."
                )
        if not self.seeds or min(self.seeds) < 0:
            raise ValueError(f"`seeds` must be numbers that are not negative, got {self.seeds}.")
        if self.full and self.variants:
            raise ValueError("`full` has no effect with `variants`: remove one of them.")
        if self.dry_run and self.report_only:
            raise ValueError("`dry_run` writes nothing and `report_only` writes the document: give one of them.")
        for name in ("num_threads", "max_train_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.max_train_steps is not None and Path(self.results_dir).resolve() == Path("docs").resolve():
            raise ValueError("`max_train_steps` needs another `results_dir` than that of the study, docs.")
        missing = [VARIANTS[name].base for name in self.variants if VARIANTS[name].base not in (None, *self.variants)]
        if missing:
            raise ValueError(f"`variants` fine-tunes {missing[0]!r}, which must be among them: add it.")

    def chosen_variants(self) -> list[str]:
        """`list[str]`: Names of the tokenizers."""
        return self.variants or [name for name, variant in VARIANTS.items() if variant.core or self.full]

    def chosen_preset(self) -> Preset:
        """[`Preset`]: With everything cut short if `max_train_steps` says so."""
        preset, steps = PRESETS[self.preset], self.max_train_steps
        if steps is None:
            return preset
        budget = preset.budget
        budget = dataclasses.replace(
            budget,
            **{
                name: min(steps, getattr(budget, name))
                for name in dataclasses.asdict(budget)
                if name.endswith("_steps")
            },
            classifier_epochs=1,
            num_samples=40,
            num_curve_samples=20,
            loss_draws=1,
            mixture_sizes=(1, 5),
            mixture_size=5,
            mixture_seeds=(0,),
        )
        return dataclasses.replace(preset, budget=budget)
