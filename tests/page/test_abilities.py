"""What the page offers for a pipeline is what the pipeline can do, and all of it."""

import pytest

from maetok_hf import FlowMatchEulerMaruyamaScheduler
from maetok_hf.page.abilities import (
    NO_CLASS,
    OWN_SOLVER,
    LoadedPipeline,
    classes_of,
    default_scheme,
    describe,
    schemes_of,
    solver_for,
    solvers_of,
)
from tests.pipelines.helpers import SCHEDULERS, generator, tiny_pipeline


GFT = {"temperature_embedding": True}


def test_classes_have_their_names_and_numbers_where_they_have_none():
    classes = classes_of(tiny_pipeline(id2label={0: "tench", 9: "ostrich"}))
    assert list(classes) == [*range(10), NO_CLASS]
    assert classes[0] == "tench" and classes[1] == "1" and classes[9] == "ostrich"
    assert NO_CLASS not in classes_of(tiny_pipeline(transformer={"class_dropout_prob": 0.0}))


@pytest.mark.parametrize(
    ("components", "schemes", "default"),
    [
        ({}, ["none", "cfg"], "cfg"),
        ({"transformer": {"class_dropout_prob": 0.0}}, ["none"], "none"),
        ({"guidance_transformer": {}}, ["none", "cfg", "autoguidance"], "autoguidance"),
        ({"transformer": GFT}, ["none", "cfg", "gft"], "gft"),
    ],
    ids=["dropout", "no dropout", "weak model", "temperatures"],
)
def test_schemes_are_those_that_the_components_allow(components, schemes, default):
    pipe = tiny_pipeline(**components)
    assert schemes_of(pipe) == schemes
    assert default_scheme(pipe) == default
    # the pipeline agrees
    if default == "none":
        with pytest.raises(ValueError, match="class_dropout_prob"):
            pipe(3, num_inference_steps=1)
    else:
        pipe(3, num_inference_steps=1, generator=generator())
        assert pipe.guidance_method == default


@pytest.mark.parametrize("name", ["euler", "sde", "unipc"])
def test_every_solver_that_is_offered_can_sample(name):
    pipe = tiny_pipeline(name)
    solvers = solvers_of(pipe)
    assert list(solvers)[0] == OWN_SOLVER and solvers[OWN_SOLVER].endswith("the pipeline's own")
    assert len(solvers) == 5
    for solver in solvers:
        pipe.scheduler = solver_for(pipe, solver)
        assert len(pipe(3, num_inference_steps=2, generator=generator()).images) == 1


def test_a_solver_keeps_the_pipelines_own_settings_and_state():
    pipe = tiny_pipeline(FlowMatchEulerMaruyamaScheduler(shift=3.0, last_step_size=0.1))
    solver = solver_for(pipe, OWN_SOLVER)
    assert solver is not pipe.scheduler and dict(solver.config) == dict(pipe.scheduler.config)


def test_another_path_has_the_one_solver_that_follows_it():
    pipe = tiny_pipeline(FlowMatchEulerMaruyamaScheduler(path="cosine"), transformer={"path": "cosine"})
    assert list(solvers_of(pipe)) == [OWN_SOLVER]


def test_words_for_a_pipeline():
    pipe = tiny_pipeline(SCHEDULERS["euler"]())
    assert describe(pipe) == "SiT · 10 classes · 6 tokens of 4 channels · 32 × 32 pixels · float32 on cpu"
    assert LoadedPipeline(pipe=pipe, name="user/name").label == "user/name"
    assert LoadedPipeline(pipe=pipe, name="user/name", revision="v2").label == "user/name @ v2"
