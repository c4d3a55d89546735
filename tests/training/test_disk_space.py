"""A run that cannot store its checkpoints says so before it begins."""

import warnings

import pytest
import torch

from maetok_hf.models import AutoencoderMAE
from maetok_hf.training.disk_space import check_disk_space, checkpoint_size
from maetok_hf.training.optim import create_ema


GB = 10**9


def test_checkpoint_holds_weights_averages_and_two_moments_of_what_is_trained():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.Linear(10, 5, bias=False))
    model[0].requires_grad_(False)
    model.register_buffer("table", torch.zeros(7))
    assert checkpoint_size([model], []) == 4 * ((100 + 50 + 7) + 2 * 50)


def test_estimate_is_the_size_of_the_files(tmp_path):
    tokenizer = AutoencoderMAE(
        sample_size=8, patch_size=4, hidden_size=32, num_layers=1, num_attention_heads=1, num_latent_tokens=2
    )
    heads = torch.nn.Linear(32, 8)
    ema = create_ema(tokenizer)
    optimizer = torch.optim.AdamW([*tokenizer.parameters(), *heads.parameters()])
    for parameter in [*tokenizer.parameters(), *heads.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "tokenizer_ema")
    torch.save(heads.state_dict(), tmp_path / "heads")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    files = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert checkpoint_size([tokenizer, heads], [ema]) == pytest.approx(files, rel=0.15)


def test_disk_without_room_for_one_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"`output_dir` runs has 2.99 GB free and one checkpoint takes 3.00 GB: make"):
        check_disk_space("runs", int(2.99 * GB), 3 * GB, total_limit=2)


@pytest.mark.parametrize(("free", "existing", "warned"), [(8, 0, True), (9, 0, False), (5, 1, True), (6, 1, False)])
def test_room_for_all_and_the_one_that_replaces_another_is_asked_for(free, existing, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_disk_space("runs", free * GB, 3 * GB, total_limit=2, existing=existing)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == warned
    if warned:
        assert f"{3 - existing} more will be there" in messages[0]
        assert "`checkpoints_total_limit` = 2" in messages[0]


@pytest.mark.parametrize("existing", [2, 3, 5])
def test_resumed_run_with_all_its_checkpoints_needs_room_for_one(existing):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_disk_space("runs", 3 * GB, 3 * GB, total_limit=2, existing=existing)
