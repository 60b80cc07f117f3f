"""The benchmarks' own rules: every suite gives figures, wrong results give none, reports are complete."""

import argparse
import json
from importlib.metadata import entry_points

import pytest
import torch
from conftest import Asks

from spikingbrain import InputError, prepare
from spikingbrain.bench import ResultsDiffer, decode, firing, gpu, machine, models, peers, report, require_close
from spikingbrain.files import write_json
from spikingbrain.spiking import encoders
from spikingbrain_kernels.library import missing

from .conftest import tiny_model
from .test_tokenizers import save_fast

SHAPE = {
    "model_type": "spikingbrain",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "mixers": ["gla", "sliding_window"],
    "window": 16,
}


@pytest.fixture
def shape(tmp_path):
    write_json(tmp_path / "shape.json", SHAPE)
    return str(tmp_path / "shape.json")


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("decode", ["--positions", "20", "--peer-positions", "20", "--tokens", "2"]),
        ("prefill", ["--lengths", "70"]),
        ("memory", ["--lengths", "10", "20"]),
    ],
)
def test_every_suite_of_models_gives_figures(shape, name, options):
    (entry,) = entry_points(group="spikingbrain.benchmarks", name=name)
    parser = argparse.ArgumentParser()
    entry.load().add_arguments(parser)
    rows = entry.load().run(parser.parse_args(["--model", shape, *options]))
    assert len(rows) > 3
    assert all(value > 0 for row in rows for value in row.values() if isinstance(value, float))


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
def test_peers_that_are_not_installed_are_named_and_not_timed(shape, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda _name: None)
    parser = argparse.ArgumentParser()
    decode.add_arguments(parser)
    options = ["--model", shape, "--positions", "9", "--peer-positions", "9", "--tokens", "1"]
    *_, first, second = decode.run(parser.parse_args(options))
    assert first == {"model": "llama.cpp: llama_cpp, gguf not installed"}
    assert second == {"model": "vLLM: vllm not installed"}


@pytest.fixture
def recorded(tmp_path):
    """A spiking model with a tokenizer, and a text."""
    spiking = {"neuron": "dead_zone", "params": {"theta": 0.9}}
    tiny_model(["gla", "sliding_window"], vocab_size=320, dtype=torch.float32, spiking=spiking).save_pretrained(
        tmp_path / "run" / "model"
    )
    save_fast(tmp_path / "run" / "model")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return tmp_path / "run" / "model"


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
def test_recorded_firing_is_timed_beside_the_dense_path(shape, recorded):
    parser = argparse.ArgumentParser()
    firing.add_arguments(parser)
    options = ["--recorded", str(recorded), "--text", str(recorded.parents[1] / "text"), "--tokens", "3"]
    rows = firing.run(parser.parse_args(["--model", shape, "--position", "20", *options]))
    assert [row["model"] for row in rows] == ["int8, dense", "int8, dead_zone, none silent", "int8, firing as run"]
    assert 0.4 < rows[2]["weights unread"] < 0.9
    assert rows[2]["times dense"] > 0


def test_a_wider_layer_fires_as_often_as_the_recorded_one_at_its_depth_and_together(shape):
    model = models.ours(shape, "fp32", None, spiking={**models.ADAPTIVE, "head": True})
    sizes = {name: encoder.neuron.channels // 2 for name, encoder in encoders(model).items()}
    fired = {name: torch.rand(50, size) < torch.linspace(0.02, 0.9, size) for name, size in sizes.items()}
    fired = {name: mask * torch.randint(1, 9, mask.shape) for name, mask in fired.items()}
    wide = firing.stretch(fired, model)
    for name, counts in fired.items():
        assert wide[name].shape == (50, 2 * counts.shape[1])
        often, wider = ((c != 0).float().mean(0).sort().values for c in (counts, wide[name]))
        assert torch.equal(wider[::2], often)
        assert torch.equal((wide[name] == 0).float().mean(1), (counts == 0).float().mean(1))
    assert 0.4 < firing.unread_weights(model, wide) < 0.7
    for lacking in ("gate_down", "lm_head"):
        short = {name: counts for name, counts in fired.items() if lacking not in name}
        with pytest.raises(InputError, match=f"nothing was recorded that .*{lacking}"):
            firing.stretch(short, model)


def test_wider_channels_lie_where_the_recorded_ones_do_but_no_copy_beside_its_like():
    torch.manual_seed(0)
    counts = torch.cat([torch.randint(0, 2, (40, 64)), torch.zeros(40, 64, dtype=torch.long)], 1)
    wide = firing.quantiles(counts, 1024, torch.Generator().manual_seed(0))
    assert bool(wide[:, :512].any(0).all())
    assert not wide[:, 512:].any()
    assert float((wide[:, :511] == wide[:, 1:512]).all(0).float().mean()) < 0.2


def test_something_that_computes_the_wrong_thing_gets_no_figures():
    good = torch.randn(100)
    assert require_close("sum", good * (1 + 1e-7), good, 1e-5) < 1e-6
    for wrong in (good * 1.01, good * float("nan")):
        with pytest.raises(ResultsDiffer, match="not timed"):
            require_close("sum", wrong, good, 1e-5)


def test_a_report_has_every_row_and_names_no_path(tmp_path):
    rows = [
        {"model": "a", "tokens/s": 12.5},
        {"model": "b", "position": 5, "tokens/s": 1234.0},
        {"model": "c: missing"},
    ]
    report.write(tmp_path / "out", "decode", "spikingbrain bench decode", rows)
    assert json.loads((tmp_path / "out" / "decode.json").read_text())["rows"] == rows
    table = (tmp_path / "out" / "decode.md").read_text()
    assert "| b | 1,234 | 5 |" in table
    assert (tmp_path / "out" / "decode.png").stat().st_size > 1000
    assert "/" not in machine()


def test_a_silenced_encoder_keeps_exactly_its_part_silent(shape):
    model = models.silence(models.silence(models.ours(shape, "fp32", None, spiking=models.ADAPTIVE), 0.2), 0.5)
    x, encoder = torch.randn(3, 32), model.model.layers[0].mixer.encoders["hidden"]
    first = encoder(x).counts == 0
    encoder.neuron.replay.advance()
    encoder.neuron.replay.advance()
    second = encoder(x).counts == 0
    assert bool((first.sum(1) == 16).all())
    assert not torch.equal(first, second)


def test_a_config_of_another_kind_is_refused(tmp_path):
    write_json(tmp_path / "qwen.json", {"model_type": "qwen2"})
    with pytest.raises(InputError, match="not a config of ours"):
        models.ours(tmp_path / "qwen.json", "fp32", None)


def test_without_a_gpu_its_suite_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(InputError, match="needs a CUDA device"):
        gpu.run(parser.parse_args([]))


def test_times_to_the_first_token_say_what_was_measured_and_what_fitted():
    softmax = {n: 1e-6 * n + 1e-10 * n**2 for n in (1000, 2000, 4000)}
    rows = gpu.first_token_rows({500: 0.1, 1000: 0.2, 4000: 0.8, 8000: 1.6}, softmax, 4, 28)
    assert [(row["tokens"], row["softmax from"]) for row in rows] == [
        (1000, "4 layers, scaled"),
        (4000, "4 layers, scaled"),
        (8000, "fitted to 3 lengths"),
    ]
    assert rows[1]["softmax s"] == pytest.approx(7 * softmax[4000])
    assert rows[2]["softmax s"] == pytest.approx(7 * (1e-6 * 8000 + 1e-10 * 8000**2))
    assert rows[2]["softmax / ours"] == pytest.approx(rows[2]["softmax s"] / 1.6)


def test_lengths_that_did_not_fit_into_memory_are_named_and_one_length_is_not_fitted():
    rows = gpu.first_token_rows({1000: 0.2, 4000: 0.8}, {1000: 0.1, 4000: None}, 4, 28)
    assert rows[0] == {"what": gpu.PEER, "tokens": 4000, "softmax from": "out of memory"}
    assert "not fitted" in rows[1]["what"]


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
@torch.inference_mode()
def test_a_decode_step_of_the_model_could_be_captured_and_reads_at_least_its_weights(shape):
    model = models.ours(shape, "bf16", None)
    step = gpu.decoder(model, 3)
    step()
    with Asks() as asks:
        logits = step()
    assert asks.found == []
    assert logits.shape == (3, 64)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # Per sequence: two states of 8 x 8 in fp32 read and written, a ring of 16 keys and values in bf16 read.
    states = 2 * (2 * 8 * 8 * 4) + 16 * 2 * 2 * 8 * 2
    assert gpu.moved_bytes(model, 3) == weights - 64 * 32 * 2 + 3 * states
    packed = prepare(model, "int8")
    assert gpu.moved_bytes(packed, 3) == models.packed_bytes(packed) + 3 * states


@torch.inference_mode()
def test_a_prompt_read_in_chunks_gives_the_models_logits(shape):
    model = models.ours(shape, "fp32", None)
    tokens = torch.randint(0, 64, (1, 70))
    logits = models.read(model, tokens, 32)
    assert torch.allclose(logits, model(tokens).logits[:, -1], atol=1e-4)


@pytest.mark.skipif(missing() is not None, reason=f"native {missing()}")
def test_what_a_step_takes_outside_kernels_is_said_only_of_one_that_is_recorded():
    dense = tiny_model(["gla"], dtype=torch.float32)
    routed = tiny_model(["gla"], dtype=torch.float32, channel_mixers=["moe"], moe={"num_experts": 3})
    assert models.OurDecoder(prepare(dense), 3).seconds_outside() > 0
    assert models.OurDecoder(routed, 3).seconds_outside() is None
