"""Sharded parameters are made whole without a trace of the sharding, and put back; whole ones are treated alike."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from maetok_hf.models import AutoencoderMAE, SiTTransformer1DModel
from maetok_hf.training.optim import create_ema, weight_decay_groups
from maetok_hf.training.sharding import (
    average_gradients,
    configure_deepspeed,
    configure_sharding,
    full_tensor,
    gather_optimizer_state,
    gather_tensors,
    load_optimizer_state,
    load_tensors,
    whole_copy,
)


SIZES = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "num_latent_tokens": 2, "latent_channels": 2}


def make_tokenizer(seed=0):
    torch.manual_seed(seed)
    return AutoencoderMAE(sample_size=8, patch_size=4, **SIZES)


@pytest.fixture
def process_group():
    """A group of this process alone, on which parameters are sharded as on several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(params=[False, True], ids=["whole", "sharded"])
def place(request):
    """A function that leaves a model alone, or shards it."""
    if not request.param:
        return lambda model: model
    request.getfixturevalue("process_group")
    return fully_shard


def images(step=0):
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * 2 - 1


def make_optimizer(model):
    return torch.optim.AdamW(weight_decay_groups(model, 0.1), lr=1e-2, fused=True)


def train(model, optimizer, steps, ema=None):
    for step in steps:
        model(images(step)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(model.parameters())


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert not isinstance(value, DTensor)
        assert torch.equal(value, other[name]), name


def test_norm_of_sharded_gradients_becomes_an_ordinary_number(place):
    reference, model = make_tokenizer(), place(make_tokenizer())
    norms = []
    for each in (reference, model):
        each(images()).sample.square().mean().backward()
        norms.append(full_tensor(torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)))
    assert not isinstance(norms[1], DTensor)
    assert norms[0] == pytest.approx(norms[1].item())


def test_gathered_tensors_are_whole_copies(place):
    expected = make_tokenizer().state_dict()
    model = place(make_tokenizer())
    copies = gather_tensors(model.state_dict())
    assert_same(copies, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(copies, expected)


def test_process_that_does_not_keep_tensors_gets_none(place):
    assert gather_tensors(place(make_tokenizer()).state_dict(), keep=False) == {}


def test_values_are_put_back_where_they_were_gathered(place):
    values = make_tokenizer(seed=1).state_dict()
    model = place(make_tokenizer())
    parameters = list(model.parameters())
    load_tensors(model.state_dict(), values)
    assert_same(gather_tensors(model.state_dict()), values)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_values_that_do_not_fit_are_refused():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"\['extra'\] are only in the file, \['bias'\] only in the module"):
        load_tensors(model.state_dict(), {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weight has shape \(1, 2\) in the file and \(3, 2\) in the module"):
        # which copying would have broadcast
        load_tensors(model.state_dict(), {"weight": torch.zeros(1, 2), "bias": torch.zeros(3)})


def make_transformer(seed=0):
    torch.manual_seed(seed)
    return SiTTransformer1DModel(
        sample_size=4, in_channels=2, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=3
    )


@pytest.mark.parametrize("make", [make_tokenizer, make_transformer])
def test_copy_has_the_weights_buffers_and_config_and_is_for_evaluation(place, make):
    reference = make()
    model = place(make().train())
    copy = whole_copy(model)
    assert_same(dict(copy.state_dict()), reference.state_dict())
    assert not any(tensor.is_meta for tensor in [*copy.parameters(), *copy.buffers()])
    assert dict(copy.config) == dict(reference.config)
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert model.training


def test_copy_reconstructs_what_the_model_would(place):
    reference = make_tokenizer().eval()
    copy = whole_copy(place(make_tokenizer()))
    with torch.no_grad():
        assert torch.equal(copy(images()).sample, reference(images()).sample)


def test_copy_is_independent_of_further_training_and_its_config(place):
    model = place(make_tokenizer())
    ema = create_ema(model, 0.5)
    copies = [whole_copy(model), whole_copy(model, ema)]
    before = [{name: value.clone() for name, value in copy.state_dict().items()} for copy in copies]
    train(model, make_optimizer(model), range(2), ema)
    for copy, state in zip(copies, before, strict=True):
        assert_same(dict(copy.state_dict()), state)
    copies[0].register_to_config(latents_mean=1.0)
    assert model.config.latents_mean is None


def test_copy_draws_no_random_numbers(place):
    model = place(make_tokenizer())
    before = torch.get_rng_state()
    whole_copy(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_process_that_does_not_keep_a_copy_gets_none(place):
    assert whole_copy(place(make_tokenizer()), keep=False) is None


def test_average_is_that_of_the_formula_and_copies_what_is_frozen(place):
    model = make_tokenizer()
    model.encoder.requires_grad_(False)
    model = place(model)
    optimizer = make_optimizer(model)
    ema = create_ema(model, 0.75)
    train(model, optimizer, [0], ema)
    expected = gather_tensors(model.state_dict())  # diffusers' first update copies
    for step in (1, 2):
        train(model, optimizer, [step], ema)
        now = gather_tensors(model.state_dict())
        expected = {name: 0.75 * expected[name] + 0.25 * now[name] for name in now}
        got = whole_copy(model, ema).state_dict()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])
    with torch.no_grad():
        model.encoder.proj_out.weight.add_(1.0)
    ema.step(model.parameters())
    copy = whole_copy(model, ema)
    assert torch.equal(copy.encoder.proj_out.weight, full_tensor(model.encoder.proj_out.weight.detach()))
    assert not torch.equal(copy.decoder.proj_out.weight, full_tensor(model.decoder.proj_out.weight.detach()))


def test_average_of_a_low_precision_model_moves():
    model = make_tokenizer().to(torch.bfloat16)
    ema = create_ema(model, 0.9999)
    assert {shadow.dtype for shadow in ema.shadow_params} == {torch.float32}
    ema.step(model.parameters())
    before = [shadow.clone() for shadow in ema.shadow_params]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    ema.step(model.parameters())
    for shadow, old in zip(ema.shadow_params, before, strict=True):
        torch.testing.assert_close(shadow - old, torch.full_like(old, 0.25e-4), rtol=0.05, atol=2e-6)


def test_optimiser_state_is_that_of_an_unsharded_run(place):
    reference, model = make_tokenizer(), place(make_tokenizer())
    states = []
    for each in (reference, model):
        optimizer = make_optimizer(each)
        train(each, optimizer, range(2))
        states.append(gather_optimizer_state(optimizer))
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, moments in states[0]["state"].items():
        assert moments.keys() == states[1]["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in moments.items():
            assert not isinstance(states[1]["state"][index][name], DTensor)
            torch.testing.assert_close(states[1]["state"][index][name], value)


def test_optimiser_continues_exactly_from_the_gathered_state(place, tmp_path):
    model = place(make_tokenizer())
    optimizer = make_optimizer(model)
    train(model, optimizer, range(2))
    weights, state = gather_tensors(model.state_dict()), gather_optimizer_state(optimizer)
    torch.save(state, tmp_path / "state")
    train(model, optimizer, range(2, 4))

    again = place(make_tokenizer(seed=1))
    load_tensors(again.state_dict(), weights)
    optimizer_again = make_optimizer(again)
    load_optimizer_state(optimizer_again, torch.load(tmp_path / "state", weights_only=True))
    train(again, optimizer_again, range(2, 4))
    assert_same(gather_tensors(again.state_dict()), gather_tensors(model.state_dict()))


def test_process_that_does_not_keep_optimiser_state_gets_none(place):
    model = place(make_tokenizer())
    optimizer = make_optimizer(model)
    train(model, optimizer, range(1))
    assert gather_optimizer_state(optimizer, keep=False) is None


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_of_a_process_alone_stay_as_they_are(request, grouped):
    if grouped:
        request.getfixturevalue("process_group")
    module = torch.nn.Linear(3, 2)
    module.weight.grad = torch.arange(6.0).view(2, 3)
    average_gradients(module.parameters())
    assert torch.equal(module.weight.grad, torch.arange(6.0).view(2, 3))
    assert module.bias.grad is None
    average_gradients([])


def accelerator(kind, fsdp_version=2, zero_stage=2, mixed_precision="no"):
    deepspeed_plugin = SimpleNamespace(zero_stage=zero_stage, deepspeed_config={"train_batch_size": "auto"})
    plugin = SimpleNamespace(mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return SimpleNamespace(
        distributed_type=kind,
        is_fsdp2=kind == "FSDP" and fsdp_version == 2,
        mixed_precision=mixed_precision,
        state=SimpleNamespace(deepspeed_plugin=deepspeed_plugin, fsdp_plugin=plugin),
    )


def test_sharding_does_not_cast():
    launched = accelerator("FSDP")
    configure_sharding(launched, supports_deepspeed=False)
    policy = launched.state.fsdp_plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None, None, None)


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        (accelerator("FSDP", fsdp_version=1), "`fsdp_version` is 1"),
        (accelerator("DEEPSPEED"), "`distributed_type: DEEPSPEED` trains one model, and this script is made for two"),
    ],
    ids=["fsdp1", "deepspeed"],
)
def test_configurations_that_cannot_work_are_refused(launched, message):
    with pytest.raises(ValueError, match=message):
        configure_sharding(launched, supports_deepspeed=False)


def test_one_model_may_train_under_deepspeed_if_its_weights_stay_whole():
    configure_sharding(accelerator("DEEPSPEED"), supports_deepspeed=True)
    with pytest.raises(ValueError, match="`zero_stage` is 3 but checkpoints need whole weights"):
        configure_sharding(accelerator("DEEPSPEED", zero_stage=3), supports_deepspeed=True)


def test_deepspeed_is_told_the_batch_and_the_clipping():
    launched = accelerator("DEEPSPEED")
    configure_deepspeed(launched, micro_batch_size=4, max_grad_norm=0.5)
    assert launched.state.deepspeed_plugin.deepspeed_config == {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
    }
    untouched = accelerator("MULTI_GPU", mixed_precision="bf16")
    configure_deepspeed(untouched, micro_batch_size=4, max_grad_norm=0.5)
    assert untouched.state.deepspeed_plugin.deepspeed_config == {"train_batch_size": "auto"}


def test_deepspeed_may_not_store_weights_in_low_precision():
    with pytest.raises(ValueError, match="`mixed_precision` is bf16, which would store"):
        configure_deepspeed(accelerator("DEEPSPEED", mixed_precision="bf16"), micro_batch_size=4, max_grad_norm=0.5)


@pytest.mark.slow
def test_two_processes_save_resume_measure_and_run_out_of_disk_together(tmp_path):
    """The checks are in sharded_run.py: FSDP2 against DDP, bit for bit over a resumption, and a full disk."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parent / "sharded_run.py"), str(tmp_path)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout
