"""The benchmark of silence: paired figures over seeds, the table and the plot; finished runs are not made again."""

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "spikes.py"


@pytest.fixture
def spikes():
    spec = importlib.util.spec_from_file_location("spikes_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(loss, silent):
    overall = {"silent_channels": silent, "mean_spikes": 3.0, "slot_sparsity": 0.8}
    encoder = {"silent_channels": silent, "histogram": [0.5, 0.4, *[0.0] * 14, 0.1], "spikes_per_channel": 1.2}
    encoders = {"model.layers.0.mixer.encoders.hidden": encoder, "model.layers.0.mlp.encoders.mixed": encoder}
    return {"loss": loss, "spikes": {"unread_weights": silent, "overall": overall, "encoders": encoders}}


@pytest.fixture
def bench(spikes, tmp_path, monkeypatch):
    """A bench whose commands only note that they were run and leave what they would."""
    demo = tmp_path / "demo"
    args = argparse.Namespace(demo=str(demo), steps=2, sequences=1, seeds=3, tokens=9)
    made = spikes.Bench(args)
    ran = []

    def command(log, verb, *words):
        ran.append((verb, log))
        if verb == "eval":
            seed = float(log[-1]) if log[-1].isdigit() else 0.0
            loss = 2.0 + 0.1 * seed + (0.02 if "65" in log else 0.0)
            words[-1].write_text(json.dumps(run(loss, 0.65 if "65" in log else 0.1)))
        else:
            out = next((word.removeprefix("out=") for word in map(str, words) if word.startswith("out=")), words[1])
            (Path(out) / "model").mkdir(parents=True)

    monkeypatch.setattr(made, "command", command)
    return made, ran


def test_runs_are_paired_by_seed_and_made_once(spikes, bench):
    made, ran = bench
    rows = made.trained()
    assert sorted(rows) == ["adaptive k=3", "dead_zone 50%", "dead_zone 65%"]
    assert [verb for verb, _ in ran].count("train") == 9
    table = spikes.summary(rows)
    assert table["dead_zone 65%"]["loss"]["mean"] == pytest.approx(2.12)
    assert table["dead_zone 65%"]["loss"]["spread"] == pytest.approx(0.1)
    paired = [0.02 / loss for loss in (2.0, 2.1, 2.2)]
    assert table["dead_zone 65%"]["loss_over_adaptive"]["seeds"] == pytest.approx(paired)
    assert table["dead_zone 65%"]["by_encoder"]["model.layers.0.mlp.encoders.mixed"] == pytest.approx(0.65)
    before = len(ran)
    assert spikes.summary(made.trained()) == table
    assert len(ran) == before


def test_the_table_and_the_plot_have_every_run(spikes, tmp_path):
    table = spikes.summary(
        {"adaptive k=3": [run(2.0, 0.1)], "other": [run(2.1, 0.6)], "dense": [{**run(1, 0), "spikes": None}]}
    )
    assert table["other"]["counts_up_to_7"] == pytest.approx(0.9)
    lines = spikes.lines(table)
    assert "| other | 2.1000 | +5.00% | 60.0% | 60.0% | 3.00 |" in lines
    assert len(lines) == 5
    spikes.plot(table, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 5000
