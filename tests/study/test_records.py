"""Records: whole or absent, of one identity, without names of places."""

import json
import os

import pytest

from maetok_hf.study.records import kept, machine, machine_line, read_record


class Fault(Exception):
    pass


def test_a_part_is_computed_once_and_again_for_another_key(tmp_path):
    computed, path = [], tmp_path / "new" / "part.json"

    def compute():
        computed.append(None)
        return {"number": len(computed), "sizes": (1, 2)}

    assert kept(path, {"seed": 0, "sizes": (1, 2)}, compute) == {"number": 1, "sizes": [1, 2]}
    assert kept(path, {"seed": 0, "sizes": [1, 2]}, compute) == {"number": 1, "sizes": [1, 2]}, "plain types"
    assert len(computed) == 1
    assert kept(path, {"seed": 1, "sizes": [1, 2]}, compute)["number"] == 2
    assert kept(path, {"seed": 0, "sizes": [1, 2]}, compute)["number"] == 3, "only the last one is kept"


def test_a_part_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise Fault

    with pytest.raises(Fault):
        kept(tmp_path / "part.json", 0, fail)
    assert not any(tmp_path.iterdir())


def test_a_half_written_part_is_never_read(tmp_path, monkeypatch):
    """Killed before the file takes its place, and with an old one of another key there."""
    path = tmp_path / "part.json"
    kept(path, "old", lambda: {"number": 1})
    before = path.read_bytes()

    def killed(*arguments):
        raise Fault

    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(os, "replace", killed)
        kept(path, "new", lambda: {"number": 2})
    assert path.read_bytes() == before
    assert kept(path, "new", lambda: {"number": 3}) == {"number": 3}


def test_a_record_counts_only_for_its_identity(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path) is None and read_record(path, {"seed": 0}) is None
    record = {"identity": {"seed": 0, "sizes": [1, 2]}, "measured": {}}
    path.write_text(json.dumps(record))
    assert read_record(path) == record
    assert read_record(path, {"sizes": (1, 2), "seed": 0}) == record, "plain types, in any order"
    for other in ({"seed": 1, "sizes": [1, 2]}, {"seed": 0}, {"seed": 0, "sizes": [1, 2], "more": 1}, {}):
        assert read_record(path, other) is None


def test_machines_are_described_without_names():
    facts = machine(2)
    assert json.loads(json.dumps(facts)) == facts and facts["threads"] == 2
    assert os.uname().nodename not in json.dumps(facts) and "/" not in json.dumps(facts["packages"])
    facts |= {"processors": 4, "architecture": "x86_64", "python": "3.12.1"}
    facts |= {"packages": {"torch": "2.0", "numpy": "1"}}
    line = "4 CPU cores (x86_64), 2 threads{}; Python 3.12.1, torch 2.0, numpy 1"
    assert machine_line(facts | {"accelerators": []}) == line.format(", no accelerator")
    assert machine_line(facts | {"accelerators": ["A", "B"]}) == line.format(" and A, B")
