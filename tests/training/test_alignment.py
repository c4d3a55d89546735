"""Representation alignment: which token meets which patch, where gradients flow, and what is left in the model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maetok_hf import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.training.alignment import FeatureAlignment, check_patches_per_token
from maetok_hf.training.flow_matching import FlowMatchingObjective


SIZES = {"sample_size": 4, "in_channels": 3, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
MODELS = (SiTTransformer1DModel, LightningDiTTransformer1DModel, USiTTransformer1DModel)
WIDTH = 16


class PatchColors(nn.Module):
    """A teacher whose features are a linear map of the colors of 4 x 4 patches."""

    feature_dim = 3
    feature_loss = "cosine"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, pixel_values):
        return self.linear(F.avg_pool2d(pixel_values, 4).flatten(2).transpose(1, 2))


def tiny_transformer(model_class=SiTTransformer1DModel, **options):
    torch.manual_seed(0)
    transformer = model_class(**SIZES | {"num_classes": 5} | options)
    with torch.no_grad():
        for parameter in transformer.parameters():  # adaLN-Zero would make every output 0
            parameter.normal_(std=0.2)
    return transformer


def make_alignment(**options):
    torch.manual_seed(1)
    return FeatureAlignment(PatchColors(), **{"in_features": WIDTH, "layer": 2, "hidden_size": 8} | options)


def make_inputs(side=16):
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 4, 3, generator=generator),
        "class_labels": torch.tensor([1, 2]),
        "draw": torch.tensor([0.3, 0.8]),
        "noise": torch.randn(2, 4, 3, generator=generator),
        "pixel_values": torch.rand(2, 3, side, side, generator=generator) * 2 - 1,
    }


def test_token_is_compared_with_its_run_of_patches_in_row_major_order():
    alignment = make_alignment(in_features=3)
    target = PatchColors()
    alignment._frozen["target"] = target
    alignment.projector = nn.Identity()
    images = make_inputs()["pixel_values"]  # 4 x 4 patches for 4 tokens: a token has a row
    features = target(images)
    tokens = features.view(2, 4, 4, 3)[:, :, 2]  # each is the third patch of its row
    similarities = [torch.cosine_similarity(tokens[:, i // 4], features[:, i], dim=-1) for i in range(16)]
    assert torch.allclose(alignment(tokens, images), -torch.stack(similarities, dim=1).mean(dim=1))
    columns = [torch.cosine_similarity(tokens[:, i % 4], features[:, i], dim=-1) for i in range(16)]
    assert not torch.allclose(alignment(tokens, images), -torch.stack(columns, dim=1).mean(dim=1), atol=1e-2)


def test_as_many_tokens_as_patches_are_compared_one_by_one():
    alignment = make_alignment(in_features=3)
    alignment.projector = nn.Identity()
    images = make_inputs(side=8)["pixel_values"]
    features = alignment._frozen["target"](images).detach()
    assert torch.allclose(alignment(features, images), torch.full((2,), -1.0))
    assert torch.allclose(alignment(-features, images), torch.full((2,), 1.0))


def test_projector_has_three_layers_and_two_activations():
    shapes = [tuple(layer.weight.shape) for layer in make_alignment().projector if isinstance(layer, nn.Linear)]
    assert shapes == [(8, WIDTH), (8, 8), (3, 8)]
    assert sum(isinstance(layer, nn.SiLU) for layer in make_alignment().projector) == 2


@pytest.mark.parametrize("num_patches", [15, 6, 2])
def test_patches_that_cannot_be_shared_out_evenly_are_refused(num_patches):
    with pytest.raises(ValueError, match=f"{num_patches} patches are no multiple of 4 tokens"):
        check_patches_per_token(num_patches, 4)
    images = torch.zeros(1, 3, 4, 4 * num_patches)
    with pytest.raises(ValueError, match=f"{num_patches} patches are no multiple of 4 tokens"):
        make_alignment()(torch.zeros(1, 4, WIDTH), images)


@pytest.mark.parametrize("model_class", MODELS)
def test_loss_is_the_weighted_sum_of_the_terms(model_class):
    transformer, alignment, inputs = tiny_transformer(model_class), make_alignment(), make_inputs()
    output = FlowMatchingObjective(transformer, alignment=alignment, alignment_weight=0.25)(**inputs)
    seen = []
    handle = transformer.transformer_blocks[1].register_forward_hook(lambda _, i, result: seen.append(result))
    images = inputs.pop("pixel_values")
    plain = FlowMatchingObjective(transformer)(**inputs)
    handle.remove()
    term = alignment(seen[0][:, -4:], images)  # the latent tokens
    assert torch.allclose(output["alignment"], term.mean())
    assert torch.equal(output["velocity"], plain["velocity"])
    assert torch.allclose(output["loss_per_image"], plain["loss_per_image"] + 0.25 * term)
    assert plain.keys() == {"loss", "loss_per_image", "velocity"} and not output["alignment"].requires_grad


def test_gradient_of_the_alignment_reaches_the_blocks_up_to_its_layer_and_not_the_teacher():
    transformer, alignment = tiny_transformer(), make_alignment()
    objective = FlowMatchingObjective(transformer, alignment=alignment, alignment_weight=1.0)
    inputs = make_inputs()
    output = objective(**inputs)
    velocity = FlowMatchingObjective(transformer)(**{k: v for k, v in inputs.items() if k != "pixel_values"})["loss"]
    (output["loss"] - velocity).backward()
    reached = [block.ff.net[2].weight.grad.abs().max() > 1e-6 for block in transformer.transformer_blocks]
    assert reached == [True, True, False]
    assert all(parameter.grad.abs().sum() > 0 for parameter in alignment.parameters())
    target = alignment._frozen["target"]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in target.parameters())


def test_a_step_of_the_projector_down_its_gradient_lowers_the_alignment():
    objective = FlowMatchingObjective(tiny_transformer(), alignment=make_alignment())
    inputs = make_inputs()
    before = objective(**inputs)
    before["loss"].backward()
    torch.optim.SGD(objective.alignment.parameters(), lr=0.1).step()
    after = objective(**inputs)
    assert after["alignment"] < before["alignment"] and torch.equal(after["velocity"], before["velocity"])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # its limit of graphs per function counts all models of a process
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model_class", "how", "guidance_free"),
    [
        *[(model_class, "checkpointed", True) for model_class in MODELS],
        *[(model_class, "compiled", False) for model_class in MODELS],
        (SiTTransformer1DModel, "compiled", True),
        (SiTTransformer1DModel, "both", True),
    ],
)
@pytest.mark.usefixtures("fresh_compiler")
def test_block_is_recorded_and_gets_its_gradients_however_it_is_called(model_class, how, guidance_free):
    inputs = make_inputs()
    if guidance_free:
        inputs["guidance_temperature"] = torch.tensor([0.3, 0.6])
    found, terms = [], []
    for wrap in (None, how):
        transformer = tiny_transformer(model_class, temperature_embedding=guidance_free)
        objective = FlowMatchingObjective(transformer, guidance_free=guidance_free, alignment=make_alignment())
        if wrap in ("checkpointed", "both"):
            transformer.enable_gradient_checkpointing()
        if wrap in ("compiled", "both"):
            transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        for _ in range(2):  # the second call meets what the first has compiled
            objective.zero_grad()
            output = objective.train()(**inputs)
            output["loss"].backward()
        terms.append(output["alignment"])
        found.append({name: parameter.grad for name, parameter in objective.named_parameters()})
    assert torch.allclose(*terms, atol=1e-6)
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-5), name


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_are_not_compiled_anew_in_every_step():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    transformer = tiny_transformer()
    objective = FlowMatchingObjective(transformer, alignment=make_alignment())
    transformer.compile_repeated_blocks(backend=counter)
    counts = []
    for _ in range(4):
        objective(**make_inputs())["loss"].backward()
        counts.append(counter.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_nothing_of_the_alignment_stays_in_the_transformer(tmp_path):
    transformer = tiny_transformer()
    names = list(transformer.state_dict())
    objective = FlowMatchingObjective(transformer, alignment=make_alignment())
    objective(**make_inputs())
    assert list(transformer.state_dict()) == names
    assert not transformer.transformer_blocks[1]._forward_hooks
    saved = {name for name in objective.state_dict() if not name.startswith("transformer.")}
    assert saved and all(name.startswith("alignment.projector.") for name in saved)


def test_hook_is_removed_after_an_error():
    objective = FlowMatchingObjective(tiny_transformer(), alignment=make_alignment())
    with pytest.raises(ValueError):
        objective(**make_inputs() | {"class_labels": torch.zeros(2, 1, dtype=torch.long)})
    assert not objective.transformer.transformer_blocks[1]._forward_hooks


def test_teacher_moves_on_request_only():
    objective = FlowMatchingObjective(tiny_transformer(), alignment=make_alignment())
    target = objective.alignment._frozen["target"]
    objective.to("meta")
    assert target.linear.weight.device.type == "cpu"
    assert objective.move_frozen("meta") is objective and target.linear.weight.device.type == "meta"


def test_images_are_required_and_refused_by_name():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="`pixel_values` has no effect without the alignment"):
        FlowMatchingObjective(tiny_transformer())(**inputs)
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match="`pixel_values` is needed by the alignment"):
        FlowMatchingObjective(tiny_transformer(), alignment=make_alignment())(**inputs)


@pytest.mark.parametrize("name", ["in_features", "layer", "hidden_size"])
def test_bad_sizes_are_named(name):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got 0"):
        make_alignment(**{name: 0})


def test_layer_beyond_the_last_block_is_refused():
    with pytest.raises(ValueError, match="`layer` of the alignment is 4, but the transformer has 3 blocks"):
        FlowMatchingObjective(tiny_transformer(), alignment=make_alignment(layer=4))
