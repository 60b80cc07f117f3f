"""What others build on AutoModel works: remote code, pipelines, placement over devices, adapters."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, pipeline

from spikingbrain.interchange import export

from .conftest import VOCABULARY, tiny_model
from .test_tokenizers import save_fast

MIXERS = ["gla", "sliding_window"]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}
ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
assert "spikingbrain" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(torch.tensor([[1, 2, 3]]), do_sample=False, pad_token_id=0, eos_token_id=None, max_new_tokens=5)
model.save_pretrained(sys.argv[2])
again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
print(json.dumps(tokens.tolist()))
"""


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(MIXERS, dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    return model


def test_an_export_loads_where_nothing_imports_us(saved, tmp_path):
    export(tmp_path / "model", tmp_path / "out")
    paths = [str(tmp_path / "out"), str(tmp_path / "again")]
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *paths], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    expected = saved.generate(torch.tensor([[1, 2, 3]]), **GREEDY).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert (tmp_path / "again" / "modeling_spikingbrain.py").exists()


def test_an_export_also_loads_where_we_are_imported(saved, tmp_path):
    export(tmp_path / "model", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.state_dict().keys() == saved.state_dict().keys()


def test_a_pipeline_generates_text(tmp_path):
    tiny_model(MIXERS, dtype=torch.float32, vocab_size=320).save_pretrained(tmp_path)
    save_fast(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    prompts = ["the state", "a window forgets"]
    outputs = generate(prompts, **GREEDY)
    assert [output[0]["generated_text"][: len(text)] for output, text in zip(outputs, prompts, strict=True)] == prompts


def test_layers_on_the_disk_give_the_same_tokens(saved, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    ids = torch.randint(1, VOCABULARY, (2, 9))
    assert torch.equal(loaded.generate(ids, **GREEDY), saved.generate(ids, **GREEDY))


def test_a_lora_step_trains_the_adapter_and_nothing_else():
    model = tiny_model(MIXERS, dtype=torch.float32).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.AdamW(trained, lr=0.01), torch.randint(0, VOCABULARY, (2, 15))
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
