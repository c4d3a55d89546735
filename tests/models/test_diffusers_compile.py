"""torch.compile and torch.export as diffusers tests them: whole graphs, no needless recompilation.

Most run the graphs with the `eager` backend: tracing, guards and recompilation are the compiler's own, only the code
generation is left out.
"""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig

from maetok_hf.models.layers import TransformerBlock
from tests.models.cases import MODEL_CASES, TRANSFORMER_CASES
from tests.testing_utils import tiny_autoencoder


@pytest.fixture(params=MODEL_CASES.values(), ids=MODEL_CASES.keys())
def case(request):
    return request.param


ONE_OF_EACH = ["rope_modulated", *TRANSFORMER_CASES]


@pytest.fixture(params=ONE_OF_EACH)
def one_of_each(request):
    return MODEL_CASES[request.param]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_repeated_blocks_compile_once_per_stack(case):
    model, expected = case.build(), case.run(case.build())
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = [m for m in model.modules() if m._compiled_call_impl is not None]
    assert compiled == [m for m in model.modules() if isinstance(m, TransformerBlock)]
    # a limit of one forbids any second graph for a stack
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for _ in range(2):
            torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=1e-5)


def test_repeated_blocks_recompile_once_over_batch_sizes(one_of_each):
    case = one_of_each
    model = case.build()
    expected = {size: case.run(case.build(), batch_size=size) for size in (2, 3, 5, 7)}
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for size, output in expected.items():
            torch.testing.assert_close(case.run(model, batch_size=size), output, atol=1e-5, rtol=1e-5)


def test_whole_model_compiles_without_graph_break(one_of_each):
    case = one_of_each
    model, expected = case.build(), case.run(case.build())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(case.run(compiled), expected, atol=1e-5, rtol=1e-5)


def test_masked_encoding_compiles():
    model = tiny_autoencoder()
    sample = MODEL_CASES["rope"].inputs()["sample"]
    mask = torch.arange(32).reshape(2, 16) % 3 == 0
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(sample, mask).sample, model(sample, mask).sample, atol=1e-5, rtol=1e-5)


def test_compiled_blocks_train_like_plain_ones(one_of_each):
    case = one_of_each
    gradients = []
    for compiled in (False, True):
        model = case.build().train()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.manual_seed(0)
        model(**case.inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_compiled_models_can_be_saved_copied_and_pickled(one_of_each, tmp_path):
    case = one_of_each
    model, expected = case.build(), case.run(case.build())
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    case.run(model)
    model.save_pretrained(tmp_path)
    for clone in (
        case.model_class.from_pretrained(tmp_path), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    ):  # fmt: skip
        torch.testing.assert_close(case.run(clone), expected, atol=1e-5, rtol=1e-5)


def test_stacks_with_group_offload_compile(one_of_each):
    case = one_of_each
    model, expected = case.build(), case.run(case.build())
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    model.compile_repeated_blocks(backend="eager")
    torch.testing.assert_close(case.run(model), expected, atol=1e-5, rtol=1e-5)


def test_models_export(case):
    model = case.build()
    exported = torch.export.export(model, args=(), kwargs=case.inputs())
    torch.testing.assert_close(exported.module()(**case.inputs())[0], case.run(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", TRANSFORMER_CASES.values(), ids=TRANSFORMER_CASES.keys())
def test_hotswapping_an_adapter_does_not_recompile(case, tmp_path):
    outputs = []
    for index, rank in enumerate((3, 6)):
        model = case.build()
        torch.manual_seed(index)
        model.add_adapter(
            LoraConfig(
                r=rank, lora_alpha=rank, target_modules=["to_q", "to_out.0", "proj_in"], init_lora_weights=False
            )
        )
        outputs.append(case.run(model))
        model.save_lora_adapter(tmp_path / str(index))
    model = case.build()
    model.enable_lora_hotswap(target_rank=6)
    files = [tmp_path / str(index) / "pytorch_lora_weights.safetensors" for index in range(2)]
    model.load_lora_adapter(files[0], adapter_name="adapter", prefix=None)
    compiled = torch.compile(model, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        torch.testing.assert_close(compiled(**case.inputs()).sample, outputs[0], atol=1e-4, rtol=1e-4)
        model.load_lora_adapter(files[1], adapter_name="adapter", hotswap=True, prefix=None)
        torch.testing.assert_close(compiled(**case.inputs()).sample, outputs[1], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_generated_code_agrees(name):
    case = MODEL_CASES[name]
    model, expected = case.build(), case.run(case.build())
    model.compile_repeated_blocks(fullgraph=True)
    with torch._inductor.utils.fresh_inductor_cache(), torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(case.run(model), expected, atol=1e-4, rtol=1e-4)
