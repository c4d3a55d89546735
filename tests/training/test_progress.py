"""What a run reports is averaged over time and processes, and describes one uninterrupted run."""

import json

import pytest
import torch

from maetok_hf.training.progress import ProgressBar, TrainingLog, TrainingMonitor


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_monitor(folder, initial=0, reduce=lambda values: values, enabled=True):
    return TrainingMonitor(folder, "tokenizer", total=10, initial=initial, reduce=reduce, enabled=enabled)


def test_terms_are_averaged_since_the_last_report(tmp_path):
    monitor = make_monitor(tmp_path)
    for loss in (1.0, 2.0, 6.0):
        monitor.add({"loss": torch.tensor(loss)})
    monitor.add({"gradient_norm": torch.tensor(5.0)})
    assert monitor.report(3, {"learning_rate": 0.5}) == {"loss": 3.0, "gradient_norm": 5.0}
    monitor.add({"loss": torch.tensor(8.0)})
    assert monitor.report(4, {}) == {"loss": 8.0}
    assert entries(tmp_path / "training_log.jsonl") == [
        {"step": 3, "gradient_norm": 5.0, "loss": 3.0, "learning_rate": 0.5},
        {"step": 4, "loss": 8.0},
    ]
    assert monitor.last_entry() == {"step": 4, "loss": 8.0}
    monitor.close()


def test_terms_are_averaged_over_processes(tmp_path):
    monitor = make_monitor(tmp_path, reduce=lambda values: values + 1)
    monitor.add({"loss": torch.tensor(1.0)})
    assert monitor.report(1, {}) == {"loss": 2.0}


def test_terms_carry_no_gradient(tmp_path):
    monitor = make_monitor(tmp_path)
    weight = torch.ones((), requires_grad=True)
    monitor.add({"loss": weight * 2})
    assert not monitor._sums["loss"].requires_grad


def test_loss_that_is_not_finite_stops_the_run_and_is_logged(tmp_path):
    monitor = make_monitor(tmp_path)
    monitor.add({"loss": torch.tensor(float("nan")), "hog": torch.tensor(1.0)})
    with pytest.raises(FloatingPointError, match="loss stopped being finite at or before step 7"):
        monitor.report(7, {})
    assert entries(tmp_path / "training_log.jsonl") == [{"step": 7, "hog": 1.0, "loss": None}]


def test_only_one_process_writes(tmp_path, capsys):
    monitor = make_monitor(tmp_path, enabled=False)
    monitor.add({"loss": torch.tensor(1.0)})
    assert monitor.report(1, {}) == {"loss": 1.0}
    assert monitor.last_entry() is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_entries_after_the_checkpoint_are_dropped_on_resumption(tmp_path):
    path = tmp_path / "training_log.jsonl"
    path.write_text('{"step": 5}\n{"step": 10}\n{"step": 15}\n{"step": 2')  # the last one was cut off by a kill
    log = TrainingLog(path, resumed_step=10)
    log.write(15, {"loss": 1.0})
    assert entries(path) == [{"step": 5}, {"step": 10}, {"step": 15, "loss": 1.0}]


def test_line_in_a_log_file_shows_losses_and_time_left(capsys):
    bar = ProgressBar(total=10, initial=0, description="tokenizer")
    for _ in range(5):
        bar.advance()
    bar.report(5, {"loss": 0.25})
    bar.close()
    text = capsys.readouterr().err
    assert text.startswith("tokenizer: 5/10 [")
    assert " left, " in text
    assert text.endswith("loss 0.25\n")


def test_bar_in_a_terminal_shows_losses(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = ProgressBar(total=10, initial=4, description="tokenizer")
    bar.advance()
    bar.report(5, {"loss": 0.25})
    bar.close()
    text = capsys.readouterr().err
    assert "5/10" in text
    assert "loss=0.25" in text
