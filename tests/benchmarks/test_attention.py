"""The comparison of attention with and without padded keys: the same results, and what the table says."""

import json

import torch

from benchmarks import attention
from maetok_hf.models.layers import padded_length
from tests.testing_utils import seeded_normal


def test_both_forms_agree():
    query, key, value = (seeded_normal(1, 45, 2, 8, seed=seed).to(torch.bfloat16) for seed in range(3))
    with attention.patch.object(attention.layers, "padded_length", lambda length: 64):
        plain, padded = (attention.attention(query, key, value, pads) for pads in (False, True))
    torch.testing.assert_close(padded, plain, atol=2e-2, rtol=2e-2)


def test_ratios_are_of_neighbors_and_the_table_says_what_the_library_pads():
    # of a round: plain and padded, the first and every other one in turn
    seconds = iter([9.0, 9.0, 9.0, 9.0, 1.0, 3.0, 8.0, 2.0])
    with torch.no_grad(), attention.patch.object(attention, "seconds_of", lambda work, device: next(seconds)):
        (found,) = attention.compare_lengths({385: "an encoder"}, 2, batch_size=4)
    assert found["times_as_fast"]["median"] == 3.5 and found["milliseconds"]["median"] == 5500
    facts = {"processors": 2, "architecture": "x", "accelerators": [], "python": "3", "packages": {}}
    report = {"command": "c", "num_rounds": 2, "num_threads": 1, "machine": facts, "lengths": [found]}
    assert "| 4 | 385 | an encoder | 5500.00" in attention.to_markdown(report)
    assert attention.to_markdown(report).count("| yes |") == 1


def test_the_committed_table_says_what_the_library_pads():
    report = json.loads((attention.RESULTS / "attention.json").read_text())
    assert (attention.RESULTS / "attention.md").read_text() == attention.to_markdown(report) + "\n"
    for entry in report["lengths"]:
        assert entry["padded_by_library"] == (padded_length(entry["length"]) > entry["length"])
        assert entry["times_as_fast"]["median"] > 1 or not entry["padded_by_library"]
