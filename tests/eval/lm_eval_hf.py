"""lm-eval's own `hf` backend on a task from local files; run by `make test-eval`, in an environment with lm-eval."""

import json

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM

TEXTS = ["the state of a linear model", "a window forgets", "spikes are whole numbers"]
TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture
def model_dir(tmp_path):
    """A byte-level model: each byte a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(tmp_path / "m")
    torch.manual_seed(0)
    config = SpikingBrainConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, window=8
    )
    SpikingBrainForCausalLM(config).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@torch.no_grad()
def test_bits_per_byte_are_those_computed_by_hand(model_dir, tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_text.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_dir), "dtype": "float32", "device": "cpu"},
        tasks=["local_text"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )
    model, total = AutoModelForCausalLM.from_pretrained(model_dir), 0.0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text)]])
        total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    expected = total / sum(len(text.encode()) for text in TEXTS) / torch.log(torch.tensor(2.0)).item()
    assert results["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-4)
