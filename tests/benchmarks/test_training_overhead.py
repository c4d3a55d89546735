"""What the script itself costs: every part of a step is in one place, and a slow one is seen."""

import signal
import time

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from benchmarks import training_overhead
from benchmarks.training_overhead import LOGGING_STEPS, NETWORK, OWN, Case, Clock, Times, on_gpu, run_case, shares
from maetok_hf.training.sharding import ShardedEMAModel


TINY_MODEL = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 1}


@pytest.fixture
def clean_process(monkeypatch):
    """What a training leaves behind in its process is put back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_only_the_outermost_of_calls_within_calls_counts():
    clock = Clock()
    inner = clock.timed("inner", lambda: time.sleep(0.01) or 7)
    outer = clock.timed("outer", inner)
    assert outer() == 7
    clock.end_step()
    inner()
    inner()
    clock.end_step()
    first, second = clock.steps
    assert first.keys() == {"outer", "step"} and second.keys() == {"inner", "step"}
    assert 0.01 <= first["outer"].wall <= first["step"].wall
    assert 0.02 <= second["inner"].wall <= second["step"].wall
    assert second["inner"].processor < 0.01, "sleeping takes no processor"


def test_a_call_that_fails_is_timed_and_does_not_stop_the_clock():
    clock = Clock()

    def fail():
        raise KeyError

    with pytest.raises(KeyError):
        clock.timed("fails", fail)()
    clock.timed("works", int)()
    clock.end_step()
    assert clock.steps[0].keys() == {"fails", "works", "step"}


def test_parts_sum_to_the_step_and_a_report_counts_as_often_as_it_is_made():
    step = {name: Times(1.0, 2.0) for name in (*NETWORK, *OWN) if name != "the rest"}
    step["step"] = Times(12.0, 25.0)
    wall, processor = shares(step, "wall"), shares(step, "processor")
    known = len(step) - 1
    assert wall["the rest"] == pytest.approx(12 - known)
    assert processor["the rest"] == pytest.approx(25 - 2 * known)
    for found, each in ((wall, 1.0), (processor, 2.0)):
        assert found["report"] == pytest.approx(each / LOGGING_STEPS)
        assert found["own"] == pytest.approx(sum(found[name] for name in OWN))
        assert found["step"] == pytest.approx(found["own"] + 3 * each)


def test_a_part_that_did_not_happen_takes_no_time():
    assert shares({"forward": Times(3.0, 3.0), "step": Times(4.0, 4.0)}, "wall")["loading"] == 0


def test_of_a_gpu_step():
    large = {"batch_size": 2, "clipped_bytes": 10e9, "averaged_bytes": 5e9}
    large["processor"] = {"milliseconds": dict.fromkeys(OWN, 0.4)}
    small = {"processor": {"milliseconds": dict.fromkeys(OWN, 0.1)}}
    found = on_gpu(large, small, flops_per_image=312e10)["A100"]
    assert found["images"] == pytest.approx(4)
    assert found["host_milliseconds"] == pytest.approx(4 * 0.2 + 5 * 0.1)
    assert found["device_milliseconds"] == pytest.approx(1000 * (3 * 10e9 + 6 * 5e9) / (0.8 * 2.0e12))
    assert found["host_percent"] == pytest.approx(1.3)  # of 100 ms


def test_a_slow_moving_average_is_found_in_its_place(tmp_path, monkeypatch, clean_process):
    average = ShardedEMAModel.step
    monkeypatch.setattr(ShardedEMAModel, "step", lambda *args: time.sleep(0.05) or average(*args))
    for number in range(16):
        PIL.Image.new("RGB", (32, 32), (16 * number, 0, 0)).save(tmp_path / f"{number}.png")
    overrides = {"model": TINY_MODEL, "total_batch_size": 4, "auxiliary_num_layers": 1, "auxiliary_hidden_size": 16}
    case = Case("tiny", "demo-tokenizer", overrides, {"mixed_precision": "no"}, warmup=1, steps=3)
    run = run_case(case, str(tmp_path), num_threads=1)
    assert len(run["seconds"]) == 3 and run["batch_size"] == 4
    for step in run["seconds"]:
        assert step.keys() == {"step", *NETWORK, *OWN} - {"the rest"}
        assert step["moving average"].wall > 0.05
        assert all(times.wall > 0 for times in step.values())
        assert shares(step, "wall")["the rest"] > 0
    summary = training_overhead.summarise(case, [run, run])
    assert summary["wall"]["num_steps"] == 6
    assert summary["wall"]["own_percent"]["median"] > summary["processor"]["own_percent"]["median"]
