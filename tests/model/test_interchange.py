"""Released checkpoints become AutoModel directories and go back; the command line does both."""

import json
import shutil

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spikingbrain import InputError
from spikingbrain.cli import main
from spikingbrain.families import recognise, w8aspike
from spikingbrain.interchange import export, import_release
from spikingbrain.quantization import QuantizedLinear

from . import w8aspike_reference
from .conftest import tiny_model
from .test_golden import GOLDEN as SPIKINGBRAIN
from .test_golden_families import GOLDEN

LIMIT = 1e-3
SIZES = {"vocab_size": 61, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5}
WIDER = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_key_value_heads": 1}


def released_tensors(config, outliers=0.0):
    """Random tensors of a W8ASpike release; `outliers`: the share of codes in +-[129, 173]."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    groups = width // config["num_attention_heads"] * config["num_key_value_heads"]
    tensors = {"model.norm.weight": torch.rand(width) + 0.5}
    tensors |= {n: torch.randn(config["vocab_size"], width) for n in ("model.embeddings.weight", "lm_head.weight")}
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes = {"attn.q_proj": (width, width), "attn.k_proj": (groups, width), "attn.v_proj": (groups, width)}
        shapes |= {"attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
        shapes |= {"mlp.down_proj": (width, inner)}
        if layer % 2 == 0:
            shapes["attn.gk_proj"] = (groups, width)
            tensors[f"{name}.attn.g_norm.weight"] = torch.rand(width // config["num_attention_heads"]) + 0.5
        for part, shape in shapes.items():
            scale = (torch.rand(shape[0], shape[1] // 128, 1) + 0.5) / shape[1] ** 0.5 / 60
            codes = torch.randn(shape[0], shape[1] // 128, 128) * 40
            codes = codes.clamp(-127, 127)
            outside = torch.rand_like(codes) < outliers
            codes[outside] = (129 + 44 * torch.rand(int(outside.sum()))) * codes[outside].sign()
            tensors[f"{name}.{part}.weight"] = (codes * scale).view(shape)
            tensors[f"{name}.{part}.weight_quantizer.scales"] = scale
            if part[5:] in ("q_proj", "k_proj", "v_proj", "gk_proj"):
                tensors[f"{name}.{part}.bias"] = torch.randn(shape[0]) * 0.3
        tensors |= {f"{name}.{norm}.weight": torch.rand(width) + 0.5 for norm in ("attn_norm", "mlp_norm")}
    return tensors


def release(path, outliers=0.0, change=None, **sizes):
    """A W8ASpike release in `path`; returns its config and tensors."""
    config = {**SIZES, **sizes, "model_type": "gla_swa", "rope_theta": 1e6, "quant_weight_group_size": None}
    tensors = released_tensors(config, outliers)
    if change is not None:
        change(tensors)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return config, tensors


@torch.no_grad()
@pytest.mark.parametrize(
    ("seed", "outliers", "sizes", "length"),
    [(0, 0.0, {}, 31), (1, 0.01, {}, 18), (2, 0.01, WIDER, 23)],
    ids=["plain", "outliers", "wider"],
)
def test_w8aspike_computes_what_its_authors_code_computes(tmp_path, seed, outliers, sizes, length):
    torch.manual_seed(seed)
    config, tensors = release(tmp_path / "release", outliers, **sizes)
    assert import_release(tmp_path / "release", tmp_path / "out") == "w8aspike"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.randint(0, 61, (2, length))
    expected = w8aspike_reference.logits(tensors, config, ids)
    assert relative_rms(model(ids).logits, expected) < LIMIT
    cache, steps = model(ids[:, :7], use_cache=True).past_key_values, []
    for t in range(7, length):
        steps.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert relative_rms(torch.cat(steps, 1), expected[:, 7:]) < LIMIT
    linear = model.model.layers[0].mlp.up_proj
    assert linear.weight.dtype == torch.int8
    assert (linear.weight_outlier_code is not None) == (outliers > 0)


def test_w8aspike_is_compact_on_disk(tmp_path):
    _, tensors = release(tmp_path / "release", 0.01)
    import_release(tmp_path / "release", tmp_path / "out", down_proj="paper")
    made = load_file(tmp_path / "out" / "model.safetensors")
    dense = sum(t.nbytes for name, t in tensors.items() if "proj.weight" in name)
    assert sum(t.nbytes for name, t in made.items() if "proj.weight" in name) < 0.4 * dense


def tensors_of(path):
    """The tensors of a released file or of a directory of ours."""
    pth = path if path.suffix == ".pth" else path / "model.pth"
    return torch.load(pth, weights_only=True) if pth.exists() else load_file(path / "model.safetensors")


def same(one, other):
    """Whether two releases or directories hold the same tensors to the bit."""
    mine, theirs = tensors_of(one), tensors_of(other)
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("down_proj", ["code", "paper"])
def test_w8aspike_goes_back_and_comes_again_to_the_bit(tmp_path, down_proj):
    _, tensors = release(tmp_path / "release", 0.01)
    import_release(tmp_path / "release", tmp_path / "a", down_proj=down_proj)
    export(tmp_path / "a", tmp_path / "back", "w8aspike")
    assert recognise(tmp_path / "back") is w8aspike
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {name: t.shape for name, t in back.items()} == {name: t.shape for name, t in tensors.items()}
    kept = [n for n in tensors if not n.endswith("proj.weight") or (down_proj == "code" and "down_proj" in n)]
    assert all(torch.equal(back[name], tensors[name]) for name in kept)
    import_release(tmp_path / "back", tmp_path / "b", down_proj=down_proj)
    assert same(tmp_path / "a", tmp_path / "b")


@torch.no_grad()
def test_the_paper_s_down_proj_is_int8_and_gets_spikes(tmp_path):
    release(tmp_path / "release")
    assert main(["import", str(tmp_path / "release"), str(tmp_path / "out"), "--down-proj", "paper"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    assert list(model.model.layers[0].mlp.encoders) == ["hidden", "mixed"]
    assert model.config.spiking["exclude"] == []


def test_automodel_on_a_raw_w8aspike_directory_says_to_import_it(tmp_path):
    config, _ = release(tmp_path / "release")
    with pytest.raises(InputError, match="spikingbrain import"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    del config["quant_weight_group_size"]
    (tmp_path / "release" / "config.json").write_text(json.dumps(config))
    assert recognise(tmp_path / "release") is w8aspike
    with pytest.raises(InputError, match="spikingbrain import"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "release")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{UP}s": t.pop(UP)}), rf"{UP}_quantizer.scales has no weight"),
        (lambda t: t.pop("model.layers.1.attn.q_proj.bias"), r"missing: model.layers.1.attn.q_proj.bias"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "unexpected: model.extra"),
        (
            lambda t: t.update({f"{UP}_quantizer.scales": torch.ones(256, 2, 1)}),
            "scales is .256, 2, 1., which does not",
        ),
        (lambda t: t.update({UP: torch.full((256, 128), torch.inf)}), "up_proj: .*not finite"),
        (lambda t: t.pop(f"{UP}_quantizer.scales"), "missing: .*up_proj.weight_scale"),
    ],
    ids=["renamed", "missing", "extra", "scale shape", "infinite", "no scale"],
)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path, change, message):
    release(tmp_path / "release", change=change)
    with pytest.raises(InputError, match=message):
        import_release(tmp_path / "release", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


RELEASES = {"gla_swa": SPIKINGBRAIN, "metala": GOLDEN / "metala", "spikegpt": GOLDEN / "spikegpt" / "model.pth"}


@pytest.mark.parametrize("family", RELEASES)
def test_a_release_comes_in_and_goes_out_by_the_commands_to_the_bit(tmp_path, family):
    assert main(["import", str(RELEASES[family]), str(tmp_path / "in")]) == 0
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--family", family]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert same(tmp_path / "out", RELEASES[family])
    assert same(tmp_path / "again", tmp_path / "in")


CHANGES = {
    "renamed": lambda tensors, name: tensors.update({f"{name}x": tensors.pop(name)}),
    "missing": lambda tensors, name: tensors.pop(name),
    "extra": lambda tensors, name: tensors.update({f"{name}x": tensors[name].clone()}),
    "other shape": lambda tensors, name: tensors.update({name: tensors[name][:-1].clone()}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", RELEASES)
def test_the_command_names_a_tensor_that_does_not_fit(tmp_path, capsys, family, change):
    source, release = RELEASES[family], tmp_path / RELEASES[family].name
    tensors = tensors_of(source)
    name = next(name for name in sorted(tensors) if name.endswith("weight") and "1." in name)
    CHANGES[change](tensors, name)
    if source.suffix == ".pth":
        torch.save(tensors, release)
    else:
        shutil.copytree(source, release)
        save_file(tensors, release / "model.safetensors", metadata={"format": "pt"})
    assert main(["import", str(release), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_goes_out_under_a_family_that_can_express_it(tmp_path):
    options = {"num_hidden_layers": 4, "dtype": torch.float32}
    model = tiny_model(["gla", "sliding_window"], **options)
    model.save_pretrained(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "theirs", "gla_swa")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert loaded.config.model_type == "gla_swa"
    ids = torch.randint(0, 61, (1, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tiny_model(["gla"], **options).save_pretrained(tmp_path / "linear")
    for family in ("gla_swa", "w8aspike"):
        with pytest.raises(InputError, match=f"{family} cannot express"):
            export(tmp_path / "linear", tmp_path / "no", family)
    assert not (tmp_path / "no").exists()


def test_a_choice_of_down_proj_is_refused_for_others_and_unknown_files_are_named(tmp_path):
    with pytest.raises(InputError, match="a choice for w8aspike"):
        import_release(SPIKINGBRAIN, tmp_path / "out", down_proj="paper")
    with pytest.raises(InputError, match="no known family"):
        import_release(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
