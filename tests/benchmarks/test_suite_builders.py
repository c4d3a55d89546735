"""Every kind of case of the suite is built and runs, with its networks at a tiny size."""

import dataclasses

import pytest
import torch

import benchmarks.__main__ as suite
from benchmarks import training_step
from benchmarks.suite import data, models, sampling, timing, training
from benchmarks.suite.cases import Settings, count_flops
from benchmarks.suite.running import run_case
from benchmarks.suite.timing import Effort
from maetok_hf.training.recipes import load_recipe
from maetok_hf.training.sit_recipe import SiTRecipe
from tests.benchmarks.test_suite import SteadyRate
from tests.benchmarks.test_training_cost import TEACHER, TINY


SETTINGS = Settings("cpu", "float32", "eager")
ONCE = Effort(min_rounds=1, max_rounds=1, seconds=0.0, warmup_seconds=0.0)
TOKENIZER = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
TRANSFORMER = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 12}
OBJECTIVE = {name: TINY[name] for name in TINY if name not in ("model", "resolution")}


def tiny_recipe(kind, path, overrides=None):
    recipe = load_recipe(kind, path, overrides)
    if kind is SiTRecipe:
        sizes = {name: value for name, value in TRANSFORMER.items() if name in recipe.model}
        return dataclasses.replace(recipe, model=recipe.model | sizes)
    return dataclasses.replace(recipe, model=recipe.model | TOKENIZER, **OBJECTIVE)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (models, training):
        monkeypatch.setattr(module, "load_recipe", tiny_recipe)
    for name in ("facebook/dinov2-large", "google/siglip-so400m-patch14-224"):
        kind = training_step.TEACHERS[name][0]
        monkeypatch.setitem(training_step.TEACHERS, name, (kind, TEACHER | {"patch_size": 14}))
    monkeypatch.setattr(data, "NUM_JPEGS", 4)
    monkeypatch.setattr(data, "LOADING_BATCH", 2)
    monkeypatch.setattr(data, "FEATURES", 16)
    monkeypatch.setattr(timing, "MatmulRate", SteadyRate)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)


def kinds_of_cases():
    """A case of every builder and kind of network, solver and guidance, in few steps."""
    found = {}
    for case in suite.CASES:
        words = case.build.keywords if hasattr(case.build, "keywords") else {}
        if "cpu" in case.devices and words.get("steps", 50) == 50:
            kind = tuple(words.get(name) for name in ("size", "scheme", "solver", "losses", "precise", "num_workers"))
            found.setdefault((case.group, getattr(case.build, "func", case.build), kind), case)
    # Inception is made at its full size, which takes 10 s
    slow = {case.name: pytest.mark.slow for case in found.values() if case.name.startswith("Inception")}
    return [
        pytest.param(case, marks=slow.get(case.name, ()), id=f"{case.group}-{case.name}") for case in found.values()
    ]


@pytest.mark.parametrize("case", kinds_of_cases())
def test_case_runs(case):
    found = run_case(case, Settings("cpu", case.dtypes[0], "eager"), 1, ONCE)
    assert found["first_call_seconds"] > 0 and found["seconds"]["median"] > 0
    assert (found["images"] > 0) == (not case.name.startswith("FID"))
    assert (found["share_of_matmul"] is not None) == bool(found["flops"] and "speedup" not in found)
    assert ("speedup" in found) == (case.group == "against the naive form")
    assert found["flops"] or case.group in ("data", "against the naive form")


@pytest.mark.parametrize(
    ("scheme", "second_passes"),
    # times 1, 0.8, 0.6, 0.4 and 0.2, of which the last three are in the interval
    [("no guidance", 0), ("CFG", 5), ("CFG with interval", 3), ("autoguidance", 3), ("GFT", 0)],
)
def test_operations_of_a_run_are_those_of_its_passes(scheme, second_passes):
    work = sampling.sample(SETTINGS, "SiT-B", "SiT-S", scheme, "ODE", steps=5, batch_size=2)
    assert work.flops() == count_flops(work.run)
    settings = {"temperature_embedding": scheme == "GFT"}
    first = models.transformer("SiT-B", **settings)
    second = models.transformer("SiT-S") if scheme == "autoguidance" else first
    latents, times, labels = models.transformer_inputs(2, torch.device("cpu"), torch.float32)
    tokenizer = SETTINGS.prepare(models.tokenizer())
    with torch.no_grad():
        passes = [count_flops(lambda model=model: model(latents, times, labels)) for model in (first, second)]
        decoding = count_flops(lambda: tokenizer.decode(latents))
    assert work.flops() == 5 * passes[0] + second_passes * passes[1] + decoding


def test_training_steps_have_weights_and_inputs_that_are_not_zero():
    work = training.tokenizer_step(Settings("cpu", "bfloat16", "eager"), "all losses, discriminator", 2)
    step, inputs = work.run.func, work.run.args[2]
    assert all(tensor.float().std() > 0 for tensor in inputs.values())
    assert inputs["pixel_values"].abs().max() == 1
    before = {name: weight.clone() for name, weight in step.tokenizer.named_parameters()}
    assert all(weight.abs().max() > 0 for weight in before.values())
    work.run()
    changed = [name for name, weight in step.tokenizer.named_parameters() if not torch.equal(weight, before[name])]
    assert len(changed) > 0.9 * len(before)  # a mask token of no masked patch would stay
    assert all(weight.isfinite().all() for weight in step.tokenizer.parameters())
