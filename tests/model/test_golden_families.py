"""MetaLA and SpikeGPT against logits, states and spikes of their authors' own code, and against their own files."""

from pathlib import Path

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from spikingbrain import InputError
from spikingbrain.families import metala, recognise, spikegpt
from spikingbrain.lif import LIF

GOLDEN = Path(__file__).parent.parent / "golden"
LIMIT = 1e-4


@pytest.fixture(scope="module", params=["metala", "spikegpt"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def golden(name):
    return load_file(GOLDEN / name / "golden.safetensors")


def as_directory(release: Path, directory: Path) -> Path:
    """A released file as a directory for AutoModel: its config, its tensors under its own names."""
    config, tensors = recognise(release).read(release)
    config.save_pretrained(directory)
    save_file(
        {tensor: tensors.get(tensor).clone() for tensor in tensors},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


@pytest.fixture(scope="module")
def directory(name, tmp_path_factory):
    return as_directory(GOLDEN / name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def test_whole_sequence(model, golden):
    out = model(input_ids=golden["input_ids"], labels=golden["input_ids"])
    assert relative_rms(out.logits, golden["logits"]) < LIMIT
    if "loss" in golden:
        assert relative_rms(out.loss, golden["loss"]) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 5, 16])
def test_any_step_size_from_a_cache(model, golden, size):
    ids = golden["input_ids"]
    out = model(input_ids=ids[:, :3], use_cache=True)
    logits = [out.logits]
    for start in range(3, ids.shape[1], size):
        chunk = ids[:, start : start + size]
        out = model(input_ids=chunk, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    assert relative_rms(torch.cat(logits, 1), golden["logits"]) < LIMIT
    if "decode_logits" in golden:
        first = int(golden["decode_from"])
        assert relative_rms(torch.cat(logits, 1)[:, first - 1 :], golden["decode_logits"]) < LIMIT


@torch.no_grad()
def test_metalas_recurrent_state():
    golden = load_file(GOLDEN / "metala" / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "metala", dtype=torch.float32).eval()
    state = model(input_ids=golden["input_ids"], use_cache=True).past_key_values.states[0]["metala.recurrent"]
    assert relative_rms(state, golden["final_recurrent_state_layer0"]) < LIMIT


@torch.no_grad()
def test_spikegpts_spikes_are_the_authors_except_at_the_threshold(tmp_path):
    golden = load_file(GOLDEN / "spikegpt" / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(as_directory(GOLDEN / "spikegpt", tmp_path)).eval()
    currents, spikes = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LIF):

            def keep(_module, inputs, outputs, name=name):
                currents[name], spikes[name] = inputs[0], outputs[0]

            module.register_forward_hook(keep)
    model(input_ids=golden["input_ids"])
    assert len(spikes) == 6
    for name, ours in spikes.items():
        _, _, layer, block, _ = name.split(".")
        theirs = golden[f"blocks.{layer}.lif{['mixer', 'mlp'].index(block) + 1}.spikes"]
        membrane = torch.zeros_like(ours[:, 0])
        for t in range(ours.shape[1]):
            charged = membrane + (currents[name][:, t] - membrane) / 2
            assert bool(((ours[:, t] == theirs[:, t]) | ((charged - 1).abs() < 1e-5)).all())
            membrane = charged * (1 - theirs[:, t])


def test_files_written_in_the_familys_form_are_the_released_ones_to_the_bit(name, model, tmp_path):
    family = recognise(GOLDEN / name)
    (tmp_path / "written").mkdir()
    family.write(model, tmp_path / "written")
    released, written = family.read(GOLDEN / name).tensors, family.read(tmp_path / "written").tensors
    assert set(written) == set(released)
    assert all(torch.equal(written.get(tensor), released.get(tensor)) for tensor in released)


def test_saved_and_loaded_is_the_same_to_the_bit(model, directory, tmp_path):
    model.save_pretrained(tmp_path)
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(directory / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[tensor], original[tensor]) for tensor in saved)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}


DAMAGE = {
    "metala": ("model.layers.1.token_mixer.aug_balance", "model.layers.1.mixer.metala.augmentation.balance"),
    "spikegpt": ("blocks.1.att.time_decay", "model.layers.1.mixer.rwkv.wkv.time_decay"),
}


@pytest.mark.parametrize("kind", ["missing", "renamed", "extra", "wrong shape"])
def test_a_tensor_that_does_not_fit_is_an_error_that_names_it(name, directory, kind, tmp_path):
    theirs, ours = DAMAGE[name]
    tensors = load_file(directory / "model.safetensors")
    if kind == "missing":
        tensors.pop(theirs)
        message = f"missing: {ours}"
    elif kind == "renamed":
        tensors[theirs + "_"] = tensors.pop(theirs)
        # Some versions of transformers say the file's name, some ours.
        last = "|".join(name.rpartition(".")[2] for name in (theirs, ours))
        message = f"missing: {ours}; unexpected: .*({last})_"
    elif kind == "extra":
        tensors["model.extra"] = tensors[theirs].clone()
        message = "unexpected: model.extra"
    else:
        tensors[theirs] = tensors[theirs][:5].clone()
        message = f"mismatched: .*{ours}"
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "keys", "tensors", "parameters"),
    [
        (
            metala,
            {"decoder_embed_dim": 2048, "decoder_layers": 16, "decoder_attention_heads": 8, "glu_dim": 5632},
            2 + 16 * 11,
            1_030_000_000,
        ),
        (spikegpt, {"n_embd": 512, "n_layer": 12, "vocab_size": 5458}, None, 46_553_088),
        (spikegpt, {"n_embd": 768, "n_layer": 18, "vocab_size": 50277}, None, 215_399_424),
    ],
    ids=["metala-1B", "spikegpt-46M", "spikegpt-216M"],
)
def test_the_released_sizes_have_their_number_of_parameters(family, keys, tensors, parameters):
    config = family.Config.from_dict({"vocab_size": 100_280, **keys, "model_type": family.MODEL_TYPE})
    with torch.device("meta"):
        model = family.ForCausalLM(config)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.005 if family is metala else 0)
    assert tensors is None or len(model.state_dict()) == tensors


def test_settings_no_released_checkpoint_has_are_refused():
    with pytest.raises(InputError, match="norm_type must be simplermsnorm"):
        metala.Config.from_dict({"norm_type": "layernorm"})
    with pytest.raises(InputError, match="cannot express this model's .*mixers"):
        metala.Config(num_hidden_layers=2, mixers=["gla"]).to_diff_dict()
    with pytest.raises(InputError, match="cannot express this model's .*norm"):
        spikegpt.Config(num_hidden_layers=2, mixers=["rwkv"]).to_diff_dict()


def test_a_pth_file_is_sized_by_its_tensors_and_never_runs_code(tmp_path):
    config, _ = spikegpt.read(GOLDEN / "spikegpt" / "model.pth")
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (97, 64, 3)
    assert config.spike_embedding
    torch.save({"emb.weight": torch.ones(2, 2), "run": print}, tmp_path / "bad.pth")
    (tmp_path / "broken.pth").write_bytes(b"no pickle")
    assert not spikegpt.recognises(tmp_path / "bad.pth")
    for file in ("bad.pth", "broken.pth", "none.pth"):
        with pytest.raises(InputError, match=file):
            spikegpt.read(tmp_path / file)


@torch.no_grad()
def test_spike_embedding_is_a_switch(tmp_path):
    as_directory(GOLDEN / "spikegpt", tmp_path)
    golden = load_file(GOLDEN / "spikegpt" / "golden.safetensors")
    real = AutoModelForCausalLM.from_pretrained(tmp_path, spike_embedding=False).eval()
    assert relative_rms(real(golden["input_ids"]).logits, golden["logits"]) > 0.1
    real.save_pretrained(tmp_path / "real")
    assert AutoConfig.from_pretrained(tmp_path / "real").spike_embedding is False


def test_spikegpt_learns(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(as_directory(GOLDEN / "spikegpt", tmp_path)).train()
    ids = torch.arange(40).remainder(7)[None].expand(2, -1) + 3
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if "layers.2" in n)
    assert losses[-1] < losses[0] / 2
