"""MetaLA and SpikeGPT equal their authors' equations for seeds, sizes and lengths that no golden file has."""

import pytest
import torch
from conftest import relative_rms
from safetensors.torch import load_file

from spikingbrain.families import metala, spikegpt

from . import authors_reference
from .test_golden_families import GOLDEN, LIMIT

METALA = {"decoder_attention_heads": 3, "decoder_embed_dim": 96, "decoder_layers": 2, "glu_dim": 80, "vocab_size": 61}
WIDER = {"decoder_attention_heads": 4, "decoder_embed_dim": 64, "decoder_layers": 4, "glu_dim": 200, "vocab_size": 97}
SPIKEGPT = {"n_embd": 48, "n_layer": 2, "vocab_size": 61}
DEEPER = {"n_embd": 80, "n_layer": 5, "vocab_size": 97}


def random_model(family, keys, seed):
    """A model of a family in fp64, whose decays and thresholds matter, and its tensors by released names."""
    torch.manual_seed(seed)
    model = family.ForCausalLM(family.Config.from_dict(keys)).double().eval()
    for name, parameter in model.named_parameters():
        scale = 2 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.5
        torch.nn.init.normal_(parameter, mean=float("norm.weight" in name or "layernorm.weight" in name), std=scale)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("seed", "keys", "length"), [(1, METALA, 3), (2, METALA, 71), (3, WIDER, 29)])
def test_metala_is_its_equations(tmp_path, seed, keys, length):
    model = random_model(metala, keys, seed)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.randint(0, keys["vocab_size"], (2, length))
    expected = authors_reference.metala(tensors, keys["decoder_layers"], keys["decoder_attention_heads"], ids)
    assert relative_rms(model(ids).logits, expected) < LIMIT


@torch.no_grad()
@pytest.mark.parametrize(("seed", "keys", "length"), [(1, SPIKEGPT, 3), (2, SPIKEGPT, 71), (3, DEEPER, 29)])
def test_spikegpt_is_its_equations(tmp_path, seed, keys, length):
    model = random_model(spikegpt, keys, seed)
    spikegpt.write(model, tmp_path)
    tensors = torch.load(tmp_path / "model.pth", weights_only=True)
    ids = torch.randint(0, keys["vocab_size"], (2, length))
    assert relative_rms(model(ids).logits, authors_reference.spikegpt(tensors, keys["n_layer"], ids)) < LIMIT


@torch.no_grad()
def test_the_equations_give_the_golden_logits():
    for name, run in (
        ("metala", lambda t, ids: authors_reference.metala(t, 3, 2, ids)),
        ("spikegpt", lambda t, ids: authors_reference.spikegpt(t, 3, ids)),
    ):
        pth = GOLDEN / name / "model.pth"
        tensors = torch.load(pth, weights_only=True) if pth.exists() else load_file(GOLDEN / name / "model.safetensors")
        golden = load_file(GOLDEN / name / "golden.safetensors")
        assert relative_rms(run(tensors, golden["input_ids"]), golden["logits"]) < LIMIT
