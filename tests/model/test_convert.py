"""Conversion loses nothing, invents nothing unsaid, and leaves nothing behind when it fails."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spikingbrain import InputError, checkpoint
from spikingbrain.calibration import turn_on_spikes
from spikingbrain.checkpoint import load_model
from spikingbrain.config import SPIKING_DEFAULTS
from spikingbrain.convert import convert

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "llama": (
        LlamaConfig,
        LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "mistral-window": (MistralConfig, MistralForCausalLM, {"sliding_window": 9}),
}
SIZES = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def make_base(tmp_path, name="qwen2", **save_options):
    config, model, options = BASES[name]
    base = model(config(**SIZES, **options)).eval()
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    base.save_pretrained(tmp_path / "base", **save_options)
    return base


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_the_same_attention_gives_the_same_logits(tmp_path, name):
    base = make_base(tmp_path, name)
    same = "sliding_window" if name.endswith("window") else "softmax"
    report = convert(tmp_path / "base", tmp_path / "out", [same])
    ids = torch.randint(0, 101, (2, 40))
    assert relative_rms(load_model(tmp_path / "out")(ids).logits, base(ids).logits) < 1e-5
    assert report["new_parameters"] == []


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_every_tensor_is_copied_or_reported_as_new(tmp_path, name):
    make_base(tmp_path, name)
    report = convert(tmp_path / "base", tmp_path / "out", ["gla", "gla+sliding_window"])
    source = load_file(tmp_path / "base" / "model.safetensors")
    made = load_file(tmp_path / "out" / "model.safetensors")
    for tensor_name, tensor in source.items():
        ours = tensor_name.replace("self_attn", "mixer")
        if "norm" in tensor_name and "self_attn" in tensor_name:
            ours = ours.replace(".mixer.", ".mixer.gla.")
        assert torch.equal(made[ours], tensor)
    new = set(report["new_parameters"])
    assert new
    assert all(bool(made[n].isfinite().all()) for n in new)
    assert report == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert len(new) + report["num_copied_tensors"] == len(made)


def test_sinks_and_a_tied_gate_add_only_sinks_and_norms(tmp_path):
    make_base(tmp_path)
    options = {"num_sinks": 6, "gate": {"tied": True}}
    report = convert(tmp_path / "base", tmp_path / "out", ["gla+sliding_window", "gla+softmax"], **options)
    layer_1 = {name.removeprefix("model.layers.1.mixer.") for name in report["new_parameters"] if ".layers.1." in name}
    assert layer_1 == {"gla.g_norm.weight", "branch_norm.gla.weight", "branch_norm.softmax.weight", "softmax.sinks"}
    sinks = load_model(tmp_path / "out").model.layers[1].mixer.softmax.sinks
    assert sinks.shape == (6, 2, 2, 16)
    assert float(sinks[:, 0].std()) == pytest.approx(0.02, rel=0.3)
    assert not sinks[:, 1].any()


def test_a_sharded_bf16_base_gives_the_same_tensors_in_bf16(tmp_path, monkeypatch):
    base = make_base(tmp_path).bfloat16()
    base.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    base.save_pretrained(tmp_path / "single")
    monkeypatch.setattr(checkpoint, "MIN_SHARD_BYTES", 50_000)
    convert(tmp_path / "sharded", tmp_path / "a", ["gla"])
    monkeypatch.undo()
    convert(tmp_path / "single", tmp_path / "b", ["gla"])
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    one, other = (load_model(tmp_path / x).state_dict() for x in "ab")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, other[n]) for n, t in one.items())


def test_pytorch_files_convert_like_safetensors(tmp_path):
    make_base(tmp_path)
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    convert(tmp_path / "base", tmp_path / "a", ["gla"])
    (tmp_path / "base" / "model.safetensors").unlink()
    halves = {f"pytorch_model-{i + 1:05d}-of-00002.bin": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in halves.items():
        torch.save(part, tmp_path / "base" / name)
    index = {"weight_map": {tensor: name for name, part in halves.items() for tensor in part}}
    (tmp_path / "base" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert(tmp_path / "base", tmp_path / "b", ["gla"])
    one, other = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    next(tmp_path.glob("base/*2.bin")).write_bytes(b"PK")
    with pytest.raises(InputError, match=r"00002-of-00002.bin is damaged"):
        convert(tmp_path / "base", tmp_path / "c", ["gla"])


MEASURE = """
import re, sys
from pathlib import Path
from spikingbrain.convert import convert

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

convert(sys.argv[1], sys.argv[3] + "/small", ["gla", "sliding_window"])
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kilobytes("VmRSS")
convert(sys.argv[2], sys.argv[3] + "/large", ["gla", "sliding_window"])
print(1024 * (kilobytes("VmHWM") - before))
"""


def test_converting_holds_less_than_one_and_a_half_of_the_largest_shard(tmp_path):
    make_base(tmp_path)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16_000}
    large = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **sizes}))
    large.save_pretrained(tmp_path / "large", max_shard_size="60MB")
    shards = [file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")]
    assert len(shards) > 2
    paths = [str(tmp_path / name) for name in ("base", "large", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 1.5 * max(shards)
    assert len(list((tmp_path / "out" / "large").glob("*.safetensors"))) > 2


def damaged(base, kind):
    file = base / "model.safetensors"
    tensors = load_file(file)
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "missing file":
        file.unlink()
    elif kind == "missing tensor":
        tensors.pop("model.norm.weight")
        save_file(tensors, file)
    elif kind == "extra tensor":
        save_file({**tensors, "model.layers.0.self_attn.extra": tensors["model.norm.weight"].clone()}, file)
    elif kind == "wrong shape":
        save_file({**tensors, "model.norm.weight": torch.ones(3)}, file)
    elif kind == "unknown key":
        (base / "config.json").write_text(json.dumps({"model_type": "spikingbrain", "mixrs": ["gla"]}))
    elif kind == "no json":
        (base / "config.json").write_text("{")


DAMAGE = {
    "truncated": "model.safetensors is damaged or truncated",
    "missing file": "lacks model.safetensors",
    "missing tensor": "lacks tensors: model.norm.weight",
    "extra tensor": "no place for: model.layers.0.mixer.gla.extra",
    "wrong shape": r"model.norm.weight is \[3\], expected \[64\]",
    "unknown key": "unknown config keys mixrs",
    "no json": "config.json is not valid JSON",
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_base_is_named_and_nothing_is_written(tmp_path, kind):
    make_base(tmp_path)
    damaged(tmp_path / "base", kind)
    with pytest.raises(InputError, match=DAMAGE[kind]):
        convert(tmp_path / "base", tmp_path / "out", ["gla"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_unsupported_architecture_and_a_full_output_are_refused(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="'gpt2'; choose from llama, mistral, qwen2, qwen3"):
        convert(tmp_path / "gpt2", tmp_path / "out", ["gla"])
    make_base(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty directory"):
        convert(tmp_path / "base", tmp_path / "out", ["gla"])
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_softmax_in_place_of_a_window_is_refused(tmp_path):
    make_base(tmp_path, "mistral-window")
    with pytest.raises(InputError, match="window of 9 tokens"):
        convert(tmp_path / "base", tmp_path / "out", ["softmax"])


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    make_base(tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert(tmp_path / "base", tmp_path / "out", ["gla"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_interrupting_leaves_nothing_behind(tmp_path, monkeypatch):
    make_base(tmp_path)

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "base", tmp_path / "out", ["gla"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_turning_on_spikes_keeps_the_weights_to_the_bit(tmp_path):
    make_base(tmp_path)
    convert(tmp_path / "base", tmp_path / "dense", ["gla", "sliding_window"])
    spiking = {"neuron": "adaptive", "params": {"k": 3.0}}
    turn_on_spikes(tmp_path / "dense", tmp_path / "spiking", spiking)
    dense, spikes = load_model(tmp_path / "dense"), load_model(tmp_path / "spiking")
    assert spikes.config.spiking == {**SPIKING_DEFAULTS, **spiking}
    assert all(torch.equal(tensor, spikes.state_dict()[name]) for name, tensor in dense.state_dict().items())
    with pytest.raises(InputError, match="convert it first"):
        turn_on_spikes(tmp_path / "base", tmp_path / "x", spiking)


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["gated_delta", "metala", "rwkv"])
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_every_linear_mixer_can_start_from_attention(tmp_path, name, mixer):
    make_base(tmp_path, name)
    report = convert(tmp_path / "base", tmp_path / "out", [mixer])
    model = load_model(tmp_path / "out")
    logits = model(torch.randint(0, 101, (2, 20))).logits
    assert bool(logits.isfinite().all())
    assert f"model.layers.0.mixer.{'r_proj' if mixer == 'rwkv' else 'g_proj'}.weight" in report["new_parameters"]
    source = load_file(tmp_path / "base" / "model.safetensors")
    written = model.state_dict()["model.layers.2.mixer.o_proj.weight"]
    assert torch.equal(written, source["model.layers.2.self_attn.o_proj.weight"])
