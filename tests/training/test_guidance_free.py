"""Guidance-free training: what it converges to, where its gradients flow, and that wrapping it changes neither."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from maetok_hf import LightningDiTTransformer1DModel, SiTTransformer1DModel, USiTTransformer1DModel
from maetok_hf.training.flow_matching import FlowMatchingObjective, interpolate, sample_flow_draws, velocity_target
from maetok_hf.training.guidance_free import unguided_velocity


SIZES = {"sample_size": 4, "in_channels": 3, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
MODELS = (SiTTransformer1DModel, LightningDiTTransformer1DModel, USiTTransformer1DModel)
BATCH = 6


def tiny_transformer(model_class=SiTTransformer1DModel, temperature_embedding=True, **options):
    torch.manual_seed(0)
    settings = SIZES | {"num_classes": 5, "temperature_embedding": temperature_embedding} | options
    transformer = model_class(**settings)
    with torch.no_grad():
        for parameter in transformer.parameters():  # adaLN-Zero would make every output 0
            parameter.normal_(std=0.2)
    return transformer


def make_inputs(guidance_free=True, class_dropout_prob=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, 4, 3, generator=generator)
    labels = torch.arange(BATCH) % 5
    draws = sample_flow_draws(
        seed, 0, range(BATCH), (4, 3), class_dropout_prob=class_dropout_prob, guidance_free=guidance_free
    )
    return {"latents": latents, "class_labels": labels} | {k: v for k, v in draws._asdict().items() if v is not None}


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


class OneVelocityPerClass(nn.Module):
    """A transformer that knows one number per class, the null class last."""

    def __init__(self, num_classes):
        super().__init__()
        self.config = SimpleNamespace(num_classes=num_classes, path="linear", temperature_embedding=True)
        self.velocities = nn.Parameter(torch.linspace(-1, 1, num_classes + 1))

    def forward(self, x, t, class_labels, return_dict, class_drop_mask=None, guidance_temperature=None):
        if class_drop_mask is not None:
            class_labels = torch.where(class_drop_mask, self.config.num_classes, class_labels)
        return (self.velocities[class_labels].reshape(-1, 1, 1).expand_as(x),)


class LinearModel(OneVelocityPerClass):
    """`(P[c] + Q[c] / beta) [x, 1]`: affine in the latents, of one channel, and able to hold the fixed point."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        del self.velocities
        self.weights = nn.Parameter(torch.zeros(num_classes + 1, 2, 2, dtype=torch.float64))

    def forward(self, x, t, class_labels, return_dict, class_drop_mask=None, guidance_temperature=None):
        if class_drop_mask is not None:
            class_labels = torch.where(class_drop_mask, self.config.num_classes, class_labels)
        factors = torch.stack([torch.ones_like(guidance_temperature), 1 / guidance_temperature], dim=1)
        slope, intercept = torch.einsum("bkf,bk->bf", self.weights[class_labels], factors).unbind(1)
        return (slope.reshape(-1, 1, 1) * x + intercept.reshape(-1, 1, 1),)


def stationary_point(objective, parameter, inputs):
    """Where the gradient, which is affine in the parameter, is zero."""

    def gradient_at(values):
        with torch.no_grad():
            parameter.copy_(values.view_as(parameter))
        return torch.autograd.grad(objective(**inputs)["loss"], parameter)[0].flatten()

    offset = gradient_at(torch.zeros(parameter.numel(), dtype=parameter.dtype))
    columns = [gradient_at(unit) - offset for unit in torch.eye(parameter.numel(), dtype=parameter.dtype)]
    return torch.linalg.pinv(torch.stack(columns, dim=1)) @ -offset


def test_at_the_optimum_a_temperature_is_guidance_of_its_inverse_scale():
    # Gaussian classes, one time; the best affine velocities are least squares fits. Every point meets every beta, with
    # the class kept and dropped, so that the fixed point is exact on this finite set.
    num_classes, points, time = 3, 40, 0.6
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat_interleave(points)
    spread = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64)[labels]
    means = torch.tensor([-2.0, 0.5, 1.5], dtype=torch.float64)[labels]
    data = means + spread * torch.randn(len(labels), generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), generator=generator, dtype=torch.float64)
    betas = torch.tensor([0.2, 0.5, 0.7, 1.0], dtype=torch.float64)

    copies = 2 * len(betas)
    inputs = {
        "latents": data.repeat(copies).reshape(-1, 1, 1),
        "class_labels": labels.repeat(copies),
        "draw": torch.full((copies * len(labels),), time, dtype=torch.float64),
        "noise": noise.repeat(copies).reshape(-1, 1, 1),
        "class_drop_mask": torch.tensor([False, True]).repeat_interleave(len(betas) * len(labels)),
        "guidance_temperature": betas.repeat_interleave(len(labels)).repeat(2),
    }
    model = LinearModel(num_classes)
    objective = FlowMatchingObjective(model, guidance_free=True)
    weights = stationary_point(objective, model.weights, inputs).view(num_classes + 1, 2, 2)

    noisy, velocity = (1 - time) * data + time * noise, noise - data
    design = torch.stack([noisy, torch.ones_like(noisy)], dim=1)

    def fit(rows):
        return torch.linalg.lstsq(design[rows], velocity[rows, None]).solution.flatten()

    unconditional = fit(labels >= 0)
    assert torch.allclose(weights[-1].sum(0), unconditional)  # the null class, whose beta is 1
    for label in range(num_classes):
        conditional = fit(labels == label)
        for beta in (0.1, 0.5, 1.0):  # also one that was never drawn
            learned = weights[label, 0] + weights[label, 1] / beta
            assert torch.allclose(learned, unconditional + (1 / beta) * (conditional - unconditional))
        assert not torch.allclose(conditional, unconditional, atol=0.1)


def test_loss_and_gradient_by_hand():
    model = OneVelocityPerClass(2)  # velocities -1, 0 and, for the null class, 1
    labels, beta = torch.tensor([0, 1]), torch.tensor([0.25, 0.5])
    data, noise = torch.zeros(2, 1, 1), torch.full((2, 1, 1), 3.0)  # the velocity is 3
    output = FlowMatchingObjective(model, guidance_free=True)(
        data, labels, torch.full((2,), 0.5), noise, guidance_temperature=beta
    )
    errors = torch.tensor([0.25 * -1 + 0.75 * 1 - 3, 0.5 * 0 + 0.5 * 1 - 3])
    assert torch.allclose(output["loss_per_image"], errors.square())
    output["loss"].backward()
    # the factor beta, the mean over two images, and nothing for the null class of the second pass
    assert torch.allclose(model.velocities.grad, torch.cat([beta * 2 * errors / 2, torch.zeros(1)]))


def test_dropped_class_has_temperature_1_and_trains_the_null_class():
    model = OneVelocityPerClass(2)
    data, noise = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0)
    inputs = (data, torch.tensor([0]), torch.full((1,), 0.5), noise, torch.tensor([True]), torch.tensor([0.25]))
    output = FlowMatchingObjective(model, guidance_free=True)(*inputs)
    output["loss"].backward()
    assert output["loss"].item() == pytest.approx((1 - 3) ** 2)
    assert torch.allclose(model.velocities.grad, torch.tensor([0.0, 0.0, 2.0 * (1 - 3)]))


@pytest.mark.parametrize("model_class", MODELS)
def test_objective_is_the_mixture_of_both_passes(model_class):
    transformer = tiny_transformer(model_class)
    inputs = make_inputs()
    output = FlowMatchingObjective(transformer.train(), guidance_free=True, direction_weight=0.5)(**inputs)
    t, drop, beta = inputs["draw"], inputs["class_drop_mask"], inputs["guidance_temperature"]
    assert drop.any() and not drop.all()
    beta = torch.where(drop, 1.0, beta)
    labels = torch.where(drop, 5, inputs["class_labels"])
    noisy = interpolate(inputs["latents"], inputs["noise"], t, "linear")
    transformer.eval()
    conditional = transformer(noisy, t, labels, guidance_temperature=beta).sample
    unconditional = transformer(noisy, t, torch.full_like(labels, 5), guidance_temperature=torch.ones(BATCH)).sample
    weight = beta[:, None, None]
    mixture = weight * conditional + (1 - weight) * unconditional
    target = velocity_target(inputs["latents"], inputs["noise"], t, "linear")
    squared = (mixture - target).square().mean(dim=(1, 2))
    direction = (1 - torch.cosine_similarity(mixture, target, dim=-1)).mean(dim=1)
    assert torch.allclose(output["loss_per_image"], squared + 0.5 * direction, atol=1e-5)


@pytest.mark.parametrize("model_class", MODELS)
def test_at_temperature_1_it_is_plain_flow_matching(model_class):
    inputs = make_inputs() | {"guidance_temperature": torch.ones(BATCH)}
    trained = tiny_transformer(model_class, temperature_embedding=False)
    finetuned = copy.deepcopy(trained)
    finetuned.enable_temperature_embedding()
    plain, guidance_free = FlowMatchingObjective(trained), FlowMatchingObjective(finetuned, guidance_free=True)
    guidance_free_output = guidance_free(**inputs)
    inputs.pop("guidance_temperature")
    output = plain(**inputs)
    assert torch.equal(output["loss_per_image"], guidance_free_output["loss_per_image"])
    output["loss"].backward()
    guidance_free_output["loss"].backward()
    for name, gradient in gradients(trained).items():
        assert torch.allclose(gradient, finetuned.get_parameter(name).grad, atol=1e-7), name


@pytest.mark.parametrize("model_class", MODELS)
def test_first_step_of_finetuning_trains_the_new_embedding(model_class):
    transformer = tiny_transformer(model_class, temperature_embedding=False)
    transformer.enable_temperature_embedding()
    FlowMatchingObjective(transformer, guidance_free=True)(**make_inputs())["loss"].backward()
    assert transformer.temperature_embed.linear_2.weight.grad.abs().sum() > 0


def test_second_pass_is_in_evaluation_mode_and_leaves_every_mode_as_it_was():
    transformer = tiny_transformer().train()
    transformer.transformer_blocks[1].eval()
    dropout = nn.Dropout(0.5)
    transformer.transformer_blocks[0].attn.to_out[1] = dropout
    x, t = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7])
    modes = [module.training for module in transformer.modules()]
    first, second = (unguided_velocity(transformer, x, t) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    assert modes == [module.training for module in transformer.modules()] and dropout.training


def test_gradients_are_the_same_under_autocast_but_for_rounding():
    inputs = make_inputs()
    objective = FlowMatchingObjective(tiny_transformer(), guidance_free=True)
    found = []
    for enabled in (False, True):
        objective.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = objective(**inputs)["loss"]
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(torch.cat([gradient.flatten() for gradient in gradients(objective).values()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.999
    assert abs(found[1].norm() / found[0].norm() - 1) < 0.02


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()  # its limit of graphs per function counts all models of a process
    yield
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(objective, how):
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(objective)
    if how == "fsdp":
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in objective.transformer.transformer_blocks:
            torch.distributed.fsdp.fully_shard(block, mesh=mesh)
        return torch.distributed.fsdp.fully_shard(objective, mesh=mesh)
    if how == "checkpointed":
        objective.transformer.enable_gradient_checkpointing()
    if how == "compiled":
        objective.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    return objective


@pytest.mark.parametrize("how", ["ddp", "fsdp", "checkpointed", "compiled"])
@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.usefixtures("one_process", "fresh_compiler")
def test_two_passes_in_one_forward_work_however_the_objective_is_wrapped(model_class, how):
    expected, losses = None, []
    for wrap in (None, how):
        objective = FlowMatchingObjective(tiny_transformer(model_class), guidance_free=True).train()
        model = wrapped(objective, wrap)
        optimizer = torch.optim.SGD(objective.parameters(), lr=0.1)
        for step in range(2):  # a wrapper complains of the first step's unused parameters in the second
            optimizer.zero_grad()
            loss = model(**make_inputs(seed=step))["loss"]
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        parameters = {
            name: getattr(parameter, "full_tensor", lambda parameter=parameter: parameter)().detach()
            for name, parameter in objective.named_parameters()
        }
        expected = expected or parameters
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter, expected[name], atol=1e-5), name


@pytest.mark.parametrize("guidance_free", [False, True])
def test_a_transformer_that_is_not_made_for_it_is_refused(guidance_free):
    with pytest.raises(
        ValueError, match="`guidance_free`.*`temperature_embedding`|`temperature_embedding`.*`guidance_free`"
    ):
        FlowMatchingObjective(tiny_transformer(temperature_embedding=not guidance_free), guidance_free=guidance_free)


def test_temperatures_are_required_and_refused_by_name():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="`guidance_temperature` must hold one temperature per image"):
        FlowMatchingObjective(tiny_transformer(), guidance_free=True)(
            **inputs | {"guidance_temperature": torch.ones(1)}
        )
    plain = FlowMatchingObjective(tiny_transformer(temperature_embedding=False))
    with pytest.raises(ValueError, match="`guidance_temperature` has no effect without `guidance_free`"):
        plain(**inputs)
    inputs.pop("guidance_temperature")
    with pytest.raises(ValueError, match="`guidance_temperature` is needed by `guidance_free`"):
        FlowMatchingObjective(tiny_transformer(), guidance_free=True)(**inputs)
