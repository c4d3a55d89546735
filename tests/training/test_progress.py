"""What a run reports is averaged over time and processes, and describes one uninterrupted run."""

import json
import re

import pytest
import torch

from maetok_hf.training import progress
from maetok_hf.training.progress import LINE_LENGTH, ProgressBar, TrainingLog, TrainingMonitor


NAN = float("nan")


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_monitor(folder, initial=0, reduce=lambda values: values, enabled=True, **settings):
    return TrainingMonitor(folder, "tokenizer", total=10, initial=initial, reduce=reduce, enabled=enabled, **settings)


def step(monitor, taken=None, **terms):
    monitor.add({name: torch.tensor(value) for name, value in terms.items()})
    monitor.advance(None if taken is None else torch.tensor(taken))


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_terms_are_averaged_over_the_steps_since_the_last_report(tmp_path):
    monitor = make_monitor(tmp_path)
    for loss in (1.0, 2.0):
        step(monitor, loss=loss)
    step(monitor, loss=6.0, gradient_norm=5.0)
    assert monitor.report(3, {"learning_rate": 0.5}) == {"loss": 3.0, "gradient_norm": 5.0, "learning_rate": 0.5}
    step(monitor, loss=8.0)
    assert monitor.report(4, {}) == {"loss": 8.0}
    assert entries(tmp_path / "training_log.jsonl") == [
        {"step": 3, "gradient_norm": 5.0, "loss": 3.0, "learning_rate": 0.5},
        {"step": 4, "loss": 8.0},
    ]
    assert monitor.last_entry() == {"step": 4, "loss": 8.0}
    monitor.close()


def test_terms_of_micro_batches_are_averaged_within_their_step(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add({"loss": torch.tensor(1.0)})
    step(monitor, loss=3.0)
    step(monitor, loss=8.0)
    assert monitor.report(2, {}) == {"loss": 5.0}


def test_terms_are_averaged_over_processes(tmp_path):
    states = {}

    def reduce(values):
        states["transfers"] = states.get("transfers", 0) + 1
        return (values + torch.tensor([9.0, 2.0])) / 2  # another process, whose two steps have losses of sum 9

    monitor = make_monitor(tmp_path, reduce=reduce)
    step(monitor, loss=1.0)
    step(monitor, loss=2.0)
    assert monitor.report(2, {}) == {"loss": 3.0}
    assert states["transfers"] == 1


def test_terms_carry_no_gradient(tmp_path):
    monitor = make_monitor(tmp_path)
    weight = torch.ones((), requires_grad=True)
    monitor.add({"loss": weight * 2})
    monitor.advance()
    assert not any(tensor.requires_grad for tensor in monitor._sums.values())


def test_skipped_steps_enter_no_average_and_are_counted(tmp_path):
    monitor = make_monitor(tmp_path)
    step(monitor, True, loss=1.0, hog=4.0)
    step(monitor, False, loss=NAN, hog=100.0)
    step(monitor, False, loss=float("inf"), hog=NAN, adversarial=NAN)
    step(monitor, True, loss=3.0, hog=6.0)
    expected = {"adversarial": None, "hog": 5.0, "loss": 2.0, "skipped_steps": 2}
    assert monitor.report(4, {}) == expected
    assert entries(tmp_path / "training_log.jsonl") == [{"step": 4} | expected]
    step(monitor, True, loss=7.0)
    assert monitor.report(5, {}) == {"loss": 7.0, "skipped_steps": 0}


def test_a_report_over_skipped_steps_only_is_null_and_does_not_raise(tmp_path, capsys):
    monitor = make_monitor(tmp_path)
    step(monitor, False, loss=NAN)
    assert monitor.report(1, {}) == {"loss": None, "skipped_steps": 1}
    assert entries(tmp_path / "training_log.jsonl") == [{"step": 1, "loss": None, "skipped_steps": 1}]
    assert capsys.readouterr().err.endswith(" s/step] loss none, skipped_steps 1\n")


def test_loss_of_a_taken_step_that_is_not_finite_stops_the_run_and_is_logged(tmp_path):
    monitor = make_monitor(tmp_path)
    step(monitor, loss=NAN, hog=1.0)
    with pytest.raises(FloatingPointError, match="loss stopped being finite at or before step 7"):
        monitor.report(7, {})
    assert entries(tmp_path / "training_log.jsonl") == [{"step": 7, "hog": 1.0, "loss": None}]


def test_nothing_is_read_from_the_device_between_reports(tmp_path, monkeypatch):
    monitor = make_monitor(tmp_path)

    def read(*args):
        raise AssertionError("the host waited for the device")

    with monkeypatch.context() as forbidden:
        for name in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
            forbidden.setattr(torch.Tensor, name, read)
        monitor.add({"loss": torch.tensor(1.0)})
        monitor.advance(torch.tensor(True))
    assert monitor.report(1, {}) == {"loss": 1.0, "skipped_steps": 0}


def test_only_one_process_writes(tmp_path, capsys):
    monitor = make_monitor(tmp_path, enabled=False)
    step(monitor, loss=1.0)
    assert monitor.report(1, {}) == {"loss": 1.0}
    assert monitor.last_entry() is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_rate_counts_the_images_since_the_last_report_also_of_a_resumed_run(tmp_path, clock, capsys):
    monitor = make_monitor(tmp_path, initial=4, total_batch_size=32)
    for _ in range(2):
        clock[0] += 4
        step(monitor, loss=1.0)
    assert monitor.report(6, {})["images_per_second"] == 2 * 32 / 8
    assert "6/10 [00:16 left, 4 s/step] images/s 8, loss 1" in capsys.readouterr().err
    clock[0] += 1
    step(monitor, loss=1.0)
    assert monitor.report(7, {})["images_per_second"] == 32
    assert "7/10 [00:09 left, 3 s/step] images/s 32, loss 1" in capsys.readouterr().err
    assert "images_per_second" not in monitor.last_entry(), "the log of a resumed run equals that of an unbroken one"


def test_entries_after_the_checkpoint_are_dropped_on_resumption(tmp_path):
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 2')  # the last one was cut off by a kill
    log = TrainingLog(path, resumed_step=10)
    log.write(15, {"loss": 1.0})
    assert entries(path) == [{"step": 5}, {"step": 10}, {"step": 15, "loss": 1.0}]


def test_line_in_a_log_file_shows_losses_and_time_left(capsys, clock):
    bar = ProgressBar(total=10, initial=0, description="tokenizer")
    clock[0] += 20
    for _ in range(5):
        bar.advance()
    bar.report(5, {"loss": 0.25})
    bar.close()
    assert capsys.readouterr().err == "tokenizer: 5/10 [00:20 left, 4 s/step] loss 0.25\n"


@pytest.mark.parametrize("count", [3, 12, 40])
def test_line_in_a_log_file_is_bounded_and_says_what_it_leaves_out(capsys, count):
    bar = ProgressBar(total=500_000, initial=0, description="tokenizer, mask_modelling")
    bar.report(123_456, {f"auxiliary_term_{i}": 1.234567e-05 * i for i in range(count)})
    line = capsys.readouterr().err.rstrip("\n")
    assert len(line) <= LINE_LENGTH
    shown = line.count("auxiliary_term_")
    left_out = re.search(r"(\d+) more in training_log\.jsonl$", line)
    assert shown + (int(left_out[1]) if left_out else 0) == count
    assert "auxiliary_term_0" in line and (left_out is None) == (count == 3)


def test_line_in_a_log_file_begins_with_the_loss(tmp_path, capsys):
    monitor = make_monitor(tmp_path)
    step(monitor, adversarial=1.0, loss=2.0, reconstruction=3.0)
    monitor.report(1, {})
    assert capsys.readouterr().err.endswith("] loss 2, adversarial 1, reconstruction 3\n")


def test_bar_in_a_terminal_shows_losses(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = ProgressBar(total=10, initial=4, description="tokenizer")
    bar.advance()
    bar.report(5, {"loss": 0.25, "hog": None})
    bar.close()
    text = capsys.readouterr().err
    assert "5/10" in text
    assert "loss=0.25, hog=none" in text
