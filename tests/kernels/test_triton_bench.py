"""`bench gpu` from start to end without a GPU: kernels interpreted, CUDA's clock and graphs stood in for."""

import argparse
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from devices import INTERPRETED
from model.conftest import tiny_config

from spikingbrain import packing
from spikingbrain.bench import gpu, report

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="stands in for a GPU, in Triton's interpreter")


class Event:
    """A time on the processor's clock."""

    def __init__(self, *, enable_timing: bool):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Graph:
    """What `captured` saw is not made again."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@contextmanager
def captured(graph):
    assert isinstance(graph, Graph)
    yield


@pytest.fixture
def stand_in(monkeypatch):
    stand_ins = {
        "is_available": lambda: True,
        "get_device_name": lambda: "Stand-in",
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": captured,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name, value in {"DEVICE": "cpu", "HEADS": 4, "GROUPS": 2, "WIDTH": 16, "_bandwidth": lambda: 1e9}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "fla" else find_spec(name))
    monkeypatch.setitem(packing.PACKED_ON, "cpu", packing.PACKED_ON["cuda"])


@pytest.mark.usefixtures("stand_in")
def test_the_suite_gives_every_figure_that_it_promises(tmp_path):
    tiny_config(["gla", "sliding_window"]).save_pretrained(tmp_path)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    lengths = ["--chunk", "16", "--lengths", "32", "48", "--peer-lengths", "32", "48", "--peer-layers", "1"]
    rows = gpu.run(parser.parse_args(["--model", str(tmp_path / "config.json"), "--batch", "2", *lengths]))
    found = {row["what"]: row for row in rows}
    for kind in ("bf16", "int8 with spikes"):
        assert found[f"decode step, {kind}, batch 2"]["of read roof"] > 0
    assert Graph.replays > 0
    assert {"chunks", "chunks and gradients", "gated_linear's gradients, 50 tokens", "prompt"} <= found.keys()
    assert found["time to first token"]["softmax / ours"] > 0
    assert "skipped" in next(what for what in found if what.startswith("chunks, fla"))
    report.write(tmp_path, "gpu", "make bench-gpu", rows)
    assert "int8 with spikes" in (tmp_path / "gpu.md").read_text()
