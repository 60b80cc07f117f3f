"""Upcycling: what it computes equals the dense model where it should, and it fails without leaving anything."""

import json

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file

from spikingbrain import InputError, checkpoint
from spikingbrain.checkpoint import load_model
from spikingbrain.cli import main
from spikingbrain.experts import routers
from spikingbrain.upcycle import upcycle

from .conftest import SINKS, VOCABULARY, tiny_model

MOE = {"num_experts": 4, "top_k": 1, "num_shared": 1}


@pytest.fixture
def dense(tmp_path):
    model = tiny_model([SINKS], dtype=torch.float32, mlp_bias=True)
    model.save_pretrained(tmp_path / "dense")
    return model


@torch.no_grad()
def with_even_routers(path):
    model = load_model(path)
    for router in routers(model).values():
        router.weight.zero_()
    return model


def logits(model):
    ids = torch.arange(60).view(2, 30) % VOCABULARY
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    "moe", [MOE, {"num_experts": 5, "top_k": 3, "num_shared": 0}, {**MOE, "num_shared": 2}], ids=str
)
def test_exact_scale_and_an_even_router_give_the_dense_logits(dense, tmp_path, moe):
    report = upcycle(tmp_path / "dense", tmp_path / "moe", moe, scale="exact", layers=[0, 2])
    assert relative_rms(logits(with_even_routers(tmp_path / "moe")), logits(dense)) < 1e-5
    assert report["max_relative_error"] < 1e-6
    assert report["factors"]["down"] == pytest.approx(1 / (moe["num_shared"] + moe["top_k"] / moe["num_experts"]))


def test_the_papers_scale_is_off_by_what_its_report_says(dense, tmp_path):
    report = upcycle(tmp_path / "dense", tmp_path / "moe", MOE, scale="paper")
    assert report["factors"] == pytest.approx(dict.fromkeys(("gate", "up", "down"), 1.25 ** (-1 / 3)))
    model, x = with_even_routers(tmp_path / "moe"), torch.randn(1, 4000, 32)
    nothing = {"positions": None, "cu_seqlens": None, "mask": None}
    for number, layer in enumerate(model.model.layers):
        x_in = x * layer.post_attention_layernorm.weight
        with torch.no_grad():
            ours, theirs = (block.mlp(x_in, {}, **nothing)[0] for block in (layer, dense.model.layers[number]))
        assert report["relative_error_by_layer"][number] == pytest.approx(relative_rms(ours, theirs), rel=0.15)
    assert 1e-3 < report["max_relative_error"] < 0.3


def test_every_tensor_is_copied_scaled_or_reported_as_new(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MIN_SHARD_BYTES", 20_000)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", MOE, scale="exact", layers=[1])
    files = list((tmp_path / "moe").glob("*.safetensors"))
    assert len(files) > 2
    made = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        if not name.startswith("model.layers.1.mlp."):
            assert torch.equal(made.pop(name), tensor)
            continue
        factor = report["factors"][name.split(".")[4].removesuffix("_proj")]
        for copy in ("shared.0", "experts.0", "experts.1", "experts.2", "experts.3"):
            ours = made.pop(name.replace(".mlp.", f".mlp.moe.{copy}."))
            assert relative_rms(ours, tensor * factor) < 1e-7
    assert sorted(made) == sorted(report["new_parameters"])
    assert made["model.layers.1.mlp.moe.router.weight"].std() == pytest.approx(dense.config.initializer_range, rel=0.3)
    model = load_model(tmp_path / "moe")
    assert report["num_parameters"] == model.num_parameters()
    assert model.config.channel_mixers == ["swiglu", "moe", "swiglu"]


@pytest.mark.usefixtures("dense")
def test_the_routers_are_a_function_of_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        upcycle(tmp_path / "dense", tmp_path / name, MOE, scale="exact", seed=seed)
    weights = [load_file(tmp_path / n / "model.safetensors")["model.layers.2.mlp.moe.router.weight"] for n in "abc"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.usefixtures("dense")
def test_the_command_says_how_large_and_how_far(tmp_path, capsys):
    arguments = ["--experts", "4", "--scale", "paper", "--layers", "0,2"]
    assert main(["upcycle", str(tmp_path / "dense"), str(tmp_path / "moe"), *arguments]) == 0
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "moe" / "upcycling.json").read_text())
    assert f"{report['num_active_parameters']:,} active on a token; experts in 2 layers" in said
    assert report["layers"] == [0, 2]


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": [1, 3]}, r"layers must be among 0 to 2, got \[3\]"),
        ({"layers": []}, "layers must be among 0 to 2, got none"),
        ({"scale": "cube"}, "unknown scale 'cube'; choose from exact, paper"),
        ({"moe": {**MOE, "score": "sigmoid"}}, "needs the score softmax"),
        ({"moe": {"num_experts": 0}}, "num_experts=0"),
    ],
)
def test_what_cannot_be_done_is_named_and_nothing_is_written(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        upcycle(tmp_path / "dense", tmp_path / "moe", **{"moe": MOE, "scale": "exact", **options})
    assert not (tmp_path / "moe").exists()


@pytest.mark.usefixtures("dense")
def test_only_a_whole_dense_model_of_ours_is_upcycled(tmp_path):
    upcycle(tmp_path / "dense", tmp_path / "moe", MOE, scale="exact", layers=[1])
    with pytest.raises(InputError, match="has experts already"):
        upcycle(tmp_path / "moe", tmp_path / "again", MOE, scale="exact")
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(InputError, match="damaged or truncated"):
        upcycle(tmp_path / "dense", tmp_path / "x", MOE, scale="exact")
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="cannot upcycle a qwen2 model; convert it first"):
        upcycle(tmp_path / "dense", tmp_path / "y", MOE, scale="exact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
