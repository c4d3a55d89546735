"""Compiled pipelines: one graph for a whole run, whatever the guidance does, and two for batches of any size."""

from unittest.mock import patch

import pytest
import torch

from maetok_hf import SiTTransformer1DModel
from tests.pipelines.helpers import generators, tiny_pipeline


LABELS = [0, 1, 2, 3, 4]
METHODS = {
    "cfg": {},
    "autoguidance": {"guidance_transformer": {}},
    "gft": {"transformer": {"temperature_embedding": True}},
}


def sample(pipe, count, **settings):
    settings = {"num_inference_steps": 4, "guidance_scale": 1.9, "guidance_interval": (0.0, 0.75)} | settings
    return pipe(LABELS[:count], generator=generators(*range(count)), output_type="pt", **settings).images


@pytest.mark.parametrize("compiled", ["no", "in place", "wrapped", "blocks"])
def test_every_step_begins_a_step_of_cuda_graphs_if_something_is_compiled(compiled):
    pipe = tiny_pipeline()
    if compiled == "in place":
        pipe.transformer.compile(backend="eager")
    elif compiled == "wrapped":
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    elif compiled == "blocks":
        pipe.transformer.compile_repeated_blocks(backend="eager")
    with patch.object(torch.compiler, "cudagraph_mark_step_begin") as mark:
        sample(pipe, 2, num_inference_steps=3)
    assert mark.call_count == (0 if compiled == "no" else 3)


def compile_all(pipe, **options):
    for name in ("transformer", "guidance_transformer"):
        if getattr(pipe, name) is not None:
            getattr(pipe, name).compile(fullgraph=True, backend="eager", **options)
    pipe.vae.decoder.compile(fullgraph=True, backend="eager", **options)


@pytest.mark.parametrize("scheduler", ["sde", pytest.param("unipc", marks=pytest.mark.slow)])
def test_one_graph_serves_every_step_phase_and_setting_of_guidance(scheduler):
    pipe = tiny_pipeline(scheduler)
    expected = [sample(pipe, 3), sample(pipe, 3, guidance_scale=1.0), sample(pipe, 3, num_inference_steps=6)]
    torch._dynamo.reset()
    compile_all(pipe)
    sample(pipe, 3, num_inference_steps=1, guidance_scale=1.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [sample(pipe, 3), sample(pipe, 3, guidance_scale=1.0), sample(pipe, 3, num_inference_steps=6)]
    for images, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(images, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_last_batch_costs_one_graph_and_no_further_size_any(method):
    pipe = tiny_pipeline(**METHODS[method])
    expected = sample(pipe, 2)
    torch._dynamo.reset()
    compile_all(pipe)
    sample(pipe, 5)
    sample(pipe, 3)  # now the compiler knows that the size changes
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(sample(pipe, 2), expected, atol=1e-4, rtol=1e-4)
        sample(pipe, 5)


def test_told_beforehand_the_compiler_needs_one_graph_for_all_batches():
    pipe = tiny_pipeline()
    torch._dynamo.reset()
    compile_all(pipe, dynamic=True)
    sample(pipe, 5)  # not 4, which is the number of channels: equal sizes share a symbol
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 2):
            sample(pipe, count)
    assert isinstance(pipe.transformer, SiTTransformer1DModel)  # compiled in place, still a component
