"""Only complete checkpoints of the same run are continued, and never past a newer one."""

import json
import warnings

import pytest

from maetok_hf.training.resumption import (
    STATE_FILE,
    check_identity,
    complete_checkpoints,
    find_checkpoint,
    remove_partial_checkpoints,
)


def make_checkpoint(folder, step, complete=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / STATE_FILE).write_text(json.dumps({"step": step}))
    return path


def test_checkpoints_are_ordered_by_step_and_incomplete_ones_do_not_count(tmp_path):
    for step in (9, 100, 10):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, complete=False)
    make_checkpoint(tmp_path / "other", 300)
    (tmp_path / "checkpoint-best").mkdir()
    names = [path.name for path in complete_checkpoints(tmp_path)]
    assert names == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_new_folder_begins_a_new_run(tmp_path):
    assert find_checkpoint(tmp_path, "latest") is None
    assert find_checkpoint(tmp_path, "none") is None


def test_going_back_past_a_newer_checkpoint_is_refused(tmp_path):
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    with pytest.raises(ValueError, match="also has checkpoint-2: continue from the newest with"):
        find_checkpoint(tmp_path, "checkpoint-1")
    # into another folder it is fine
    other = tmp_path / "other"
    other.mkdir()
    assert find_checkpoint(other, str(tmp_path / "checkpoint-1")).name == "checkpoint-1"
    assert find_checkpoint(tmp_path, "checkpoint-2").name == "checkpoint-2"


def test_unknown_checkpoint_is_an_error_that_lists_the_complete_ones(tmp_path):
    make_checkpoint(tmp_path, 4)
    make_checkpoint(tmp_path, 5, complete=False)
    for name in ("checkpoint-5", "checkpoint-6"):
        with pytest.raises(ValueError, match=rf"'{name}' is not a complete checkpoint.*: checkpoint-4\.$"):
            find_checkpoint(tmp_path, name)


def test_new_run_does_not_mix_with_an_earlier_one(tmp_path):
    make_checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match=r"checkpoints of an earlier run \(checkpoint-4\)"):
        find_checkpoint(tmp_path, "none")


def test_other_settings_are_refused_and_listed(tmp_path):
    recorded = {"recipe": {"learning_rate": 1e-3, "max_train_steps": 10}, "seed": 0}
    current = {"recipe": {"learning_rate": 2e-3, "max_train_steps": 20}, "seed": 0, "stage": "new"}
    with pytest.raises(ValueError) as caught:
        check_identity(tmp_path, recorded, current)
    message = str(caught.value)
    assert "recipe.learning_rate: 0.001 there, 0.002 now" in message
    assert "stage: None there, 'new' now" in message
    assert "max_train_steps" not in message
    assert "seed" not in message


def test_longer_run_may_continue_a_shorter_one(tmp_path):
    recorded, current = ({"recipe": {"max_train_steps": steps}, "seed": 0} for steps in (10, 20))
    with pytest.warns(UserWarning, match="recipe.max_train_steps is 20 now and was 10"):
        check_identity(tmp_path, recorded, current)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_identity(tmp_path, recorded, recorded)


def test_only_leftovers_of_interrupted_saves_are_removed(tmp_path):
    complete = make_checkpoint(tmp_path, 3)
    partial = tmp_path / ".checkpoint-5.partial"
    (partial / "tokenizer").mkdir(parents=True)
    remove_partial_checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == [complete]
