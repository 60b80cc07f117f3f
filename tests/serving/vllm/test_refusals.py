"""A config or a checkpoint that does not fit is refused when vLLM starts, with the reason."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from .conftest import change_config, engine, save

pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")


def change_tensors(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(tensors):
    del tensors["model.layers.0.mixer.gla.g_norm.weight"]


def add(tensors):
    tensors["model.layers.0.mixer.u_proj.weight"] = tensors["model.layers.0.mixer.q_proj.weight"].clone()


def cut(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"][:-2].clone()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, r"missing: model\.layers\.0\.mixer\.gla\.g_norm\.weight"),
        (add, r"unexpected: model\.layers\.0\.mixer\.u_proj\.weight"),
        (cut, r"mismatched: model\.layers\.1\.mlp\.up_proj\.weight \[126, 128\] for \[128, 128\]"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, change, reason):
    path = save(tmp_path / "model")
    change_tensors(path, change)
    with pytest.raises(ValueError, match=reason), engine(path):
        pass


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"gate": {"normaliser": 16}}, "unknown keys normaliser in gate"),
        ({"mixers": ["glaa"]}, "unknown name 'glaa' in mixers; choose from"),
        ({"windows": 8}, "unknown config keys windows"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_the_choices(tmp_path, keys, reason):
    path = save(tmp_path / "model")
    change_config(path, **keys)
    with pytest.raises(ValueError, match=reason), engine(path):
        pass


def test_expert_parallelism_is_refused_where_vllm_has_none(tmp_path):
    path = save(tmp_path / "model", channel_mixers=["moe"])
    refused = pytest.raises(ValueError, match="no expert parallelism on a CPU")
    with refused, engine(path, enable_expert_parallel=True):
        pass


def test_importing_the_plugin_imports_no_vllm():
    code = "import sys, spikingbrain_serving.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
