"""The suite of speed: what it counts and writes, with works that take no time."""

import json
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config

import benchmarks.__main__ as suite
from benchmarks.suite import timing
from benchmarks.suite.cases import Case, Settings, Work, all_settings, key_of
from benchmarks.suite.models import fill, transformer
from benchmarks.suite.report import compare, to_markdown
from benchmarks.suite.running import identity, measure, merge, run_case
from benchmarks.suite.timing import MATMUL_FLOPS, Effort, PeakMemory, time_work
from tests.testing_utils import tiny_transformer


CPU = torch.device("cpu")
SETTINGS = Settings("cpu", "float32", "eager")
QUICK = Effort(min_rounds=2, max_rounds=2, seconds=0.0, warmup_seconds=0.0)


class SteadyRate:
    """A matrix product that always takes a hundredth of a second."""

    def __init__(self, device, dtype):
        pass

    def look(self):
        return 0.01


def told_seconds():
    """Works that return how long they took."""
    return patch.object(timing, "seconds_of", lambda run, device: run())


def test_share_is_that_of_the_products_around_a_call():
    looks = iter([1.0, 3.0, 1.0])

    class ChangingRate(SteadyRate):
        def look(self):
            return next(looks)

    with (
        patch.object(timing, "MatmulRate", ChangingRate),
        patch.object(timing, "seconds_of", lambda run, device: run()),
    ):
        found = time_work(Work(lambda: 4.0, images=1), MATMUL_FLOPS, CPU, torch.float32, QUICK)
    # in 4 seconds as many operations as the product does in 2
    assert found["share_of_matmul"] == {"median": 0.5, "quartile_1": 0.5, "quartile_3": 0.5}
    assert found["seconds"]["median"] == 4.0 and found["num_rounds"] == 2
    assert found["matmul_flops_per_second"] == MATMUL_FLOPS / 1.0


def test_rival_is_timed_in_turn_and_compared_call_by_call():
    calls = []

    def call(name, seconds):
        calls.append(name)
        return next(seconds)

    ours, theirs = iter([1.0, 1.0, 2.0, 4.0]), iter([0.0, 3.0, 12.0])
    work = Work(lambda: call("ours", ours), images=1, rival=lambda: call("theirs", theirs))
    with patch.object(timing, "MatmulRate", SteadyRate), told_seconds():
        found = time_work(work, 100, CPU, torch.float32, QUICK)
    # after the warm-up, the one whose memory is looked at and the rival's first
    assert calls[3:] == ["ours", "theirs", "theirs", "ours"]
    assert found["speedup"]["median"] == (3.0 / 2.0 + 12.0 / 4.0) / 2
    assert found["share_of_matmul"] is None


def test_peak_memory_is_that_since_its_making():
    large = torch.ones(64 * 2**20)  # 256 MB
    del large
    memory = PeakMemory(CPU)
    low = memory.read()
    large = torch.ones(64 * 2**20)
    assert memory.read() - low > 200e6 and large[0] == 1


def flops_of_sit(layers, width, tokens, channels, batch):
    """A closed formula: two operations for each weight that meets a token or a condition, and for each score."""
    a_block = 12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2
    frame = 2 * tokens * channels * width + 2 * width**2 + (256 + width) * width
    return 2 * batch * (layers * a_block + frame)


def test_operations_of_a_transformer_follow_the_formula():
    model = tiny_transformer()
    config, width = model.config, model.hidden_size

    def build(settings):
        inputs = torch.zeros(3, config.sample_size, config.in_channels), torch.rand(3), torch.tensor([0, 1, 2])
        return Work(torch.no_grad()(lambda: model(*inputs)), images=3)

    with patch("torch.set_num_threads"), patch.object(timing, "MatmulRate", SteadyRate):
        found = run_case(Case("group", "name", build), SETTINGS, 1, QUICK)
    expected = flops_of_sit(config.num_layers, width, config.sample_size, config.in_channels, batch=3)
    assert found["flops"] == expected and found["images"] == 3
    assert found["first_call_seconds"] > 0


def test_published_size_has_the_operations_of_the_formula():
    with patch("benchmarks.suite.models.fill", lambda module: module):  # no memory
        sit = transformer("SiT-L")
    config = sit.config
    assert (config.num_layers, sit.hidden_size, config.sample_size) == (24, 1024, 128)
    assert 78e9 < flops_of_sit(24, 1024, 128, 32, batch=1) < 80e9


def test_weights_are_filled_so_that_nothing_is_gated_away():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model = fill(model)
    assert all(parameter.abs().max() > 0 for parameter in model[0].parameters())
    again = fill(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    assert torch.equal(model[0].weight, again[0].weight)


def test_placing_casts_all_but_frequencies():
    model = nn.Module()
    model.freqs = nn.Parameter(torch.ones(2))
    model.linear = nn.Linear(2, 2)
    placed = Settings("cpu", "bfloat16", "eager").place(model)
    assert placed.freqs.dtype == torch.float32 and placed.linear.weight.dtype == torch.bfloat16
    assert not placed.training and not placed.linear.weight.requires_grad


@pytest.mark.slow  # compiles
def test_compiled_on_a_cpu_matrices_are_constants():
    model = SETTINGS.place(fill(tiny_transformer()))
    config = model.config
    inputs = (torch.ones(2, config.sample_size, config.in_channels), torch.rand(2), torch.zeros(2, dtype=torch.long))
    with inductor_config.patch(freezing=False), torch.no_grad():
        Settings("cpu", "float32", "compiled").compile(model)
        before = model(*inputs).sample
        assert before.abs().max() > 0
        model.proj_out.weight.zero_()
        torch.testing.assert_close(model(*inputs).sample, before)


def test_cuda_graphs_are_a_mode_of_cuda_only():
    assert all_settings(["cpu", "cuda"], ["float32"], ["cuda-graphs"]) == [Settings("cuda", "float32", "cuda-graphs")]


def failing(settings):
    raise MemoryError("no memory\nand a second line")


@pytest.mark.slow  # a process of its own
def test_case_that_fails_is_a_record_that_says_so():
    record = measure(Case("group", "name", failing), SETTINGS, 1, QUICK)
    assert record["failed"] == "MemoryError: no memory" and record["case"] == "name"


def record_of(name, seconds, **settings):
    quartiles = dict.fromkeys(("median", "quartile_1", "quartile_3"), seconds)
    share = dict.fromkeys(quartiles, 0.5)
    measured = {"images": 4, "flops": 2 * 10**9, "seconds": quartiles, "share_of_matmul": share}
    measured |= {"num_rounds": 5, "first_call_seconds": 9.0, "matmul_flops_per_second": 3e11, "peak_bytes": 10**9}
    return (
        identity(Case("group", name, failing), Settings("cpu", "float32", "eager"))
        | {"commit": "abc"}
        | measured
        | settings
    )


def test_records_replace_those_of_the_same_case_and_settings():
    records = [record_of("a", 1.0), record_of("b", 1.0)]
    records = merge(records, record_of("a", 2.0))
    records = merge(records, record_of("a", 3.0, dtype="bfloat16"))
    assert [(r["case"], r["dtype"], r["seconds"]["median"]) for r in records] == [
        ("b", "float32", 1.0), ("a", "float32", 2.0), ("a", "bfloat16", 3.0),
    ]  # fmt: skip
    assert len({key_of(record) for record in records}) == 3


def facts():
    return {"processors": 2, "architecture": "x", "accelerators": [], "python": "3", "packages": {}}


def test_tables_say_what_was_measured_failed_or_not_measured():
    cases = [
        Case("group", "a", failing), Case("group", "b", failing, devices=("cpu",)),
        Case("group", "c", failing, devices=("cpu",)),
    ]  # fmt: skip
    failed = identity(cases[1], SETTINGS) | {"failed": "MemoryError: no"}
    earlier = record_of("c", 2.0, dtype="bfloat16", commit=None)
    report = {
        "records": [failed, record_of("a", 2.0), earlier],
        "machine": facts(),
        "num_threads": 2,
        "command": "the command",
    }
    text = to_markdown(report, cases, "How.")
    assert "| a | float32 | eager | 2 (2 to 2) | 2 | 2 | 50 (50 to 50) | 5 | 9 | 1 |" in text
    assert "failed: MemoryError: no" in text
    assert text.index("| a |") < text.index("| b |")  # in the order of the cases
    assert "CPU, not measured: a (float32 compiled, bfloat16 eager, bfloat16 compiled); b (" in text
    assert (
        "; c (float32 eager" in text
        and "| c | bfloat16 | eager (earlier code) |" in text
        and "CUDA: not measured, 1 cases." in text
    )
    assert "How." in text and "the command" in text and "cpu float32 300 to 300" in text


def test_comparison_gives_ratios_of_common_cases_only():
    first = {"machine": facts(), "records": [record_of("a", 2.0), record_of("only here", 1.0)]}
    second = {"machine": facts(), "records": [record_of("a", 0.5)]}
    text = compare(first, second)
    assert "| group / a / cpu / float32 / eager | 2 | 0.5 | 4.00 | 50 % | 50 % |" in text
    assert "Only in the first: 1. Only in the second: 0." in text
    with pytest.raises(ValueError, match="no measured case in common"):
        compare(first, {"machine": facts(), "records": []})


def sleeping(settings, seconds):
    return Work(lambda: None, images=1, counted=False)


def test_command_measures_groups_keeps_others_and_refuses_other_machines(tmp_path, capsys):
    path = tmp_path / "suite.json"
    cases = [
        Case(group, "only", partial(sleeping, seconds=0), modes=("eager",), dtypes=("float32",))
        for group in ("tokenizer", "generators")
    ]
    words = ["benchmarks", "--output", str(path), "--seconds", "0.001"]

    def inline(case, settings, num_threads, effort):
        with patch.object(timing, "MatmulRate", SteadyRate):
            return identity(case, settings) | {"commit": "abc"} | run_case(case, settings, num_threads, QUICK)

    def command(*more):
        with patch("sys.argv", [*words, "--num_threads", str(torch.get_num_threads()), *more]):
            return suite.main()

    with patch.object(suite, "CASES", cases), patch.object(suite, "measure", inline):
        assert command("--groups", "tokenizer", "--devices", "cpu") == 0
        assert command("--groups", "generators", "--devices", "cpu") == 0
    report = json.loads(path.read_text())
    assert [record["group"] for record in report["records"]] == ["tokenizer", "generators"]
    assert "| only | float32 | eager |" in path.with_suffix(".md").read_text()

    assert command("--compare", str(path), str(path)) == 0
    assert "1.00" in capsys.readouterr().out
    path.write_text(json.dumps(report | {"num_threads": 999}))
    with patch.object(suite, "CASES", cases), patch.object(suite, "measure", inline):
        assert command("--groups", "tokenizer", "--devices", "cpu") == 2
    assert "another machine" in capsys.readouterr().err
    path.write_text("[]")
    assert command("--compare", str(path), str(path)) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_threads", "0"], "must be positive"),
        (["--output", "results"], "must name a .json file"),
        (["--groups", "nothing"], "invalid choice"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as error:
        suite.parse(words)
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without the device")
def test_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        suite.parse(["--devices", "cuda"])
    assert "not on this machine, which has: cpu" in capsys.readouterr().err


def test_every_case_has_a_name_of_its_own_and_both_devices_are_there():
    keys = [(case.group, case.name, device) for case in suite.CASES for device in case.devices]
    assert len(keys) == len(set(keys))
    for group in ("tokenizer", "generators", "training", "sampling", "against the naive form"):
        devices = {device for case in suite.CASES if case.group == group for device in case.devices}
        assert devices == {"cpu", "cuda"}
