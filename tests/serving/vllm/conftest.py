"""Tiny checkpoints and vLLM's own engine on them, all in one process: importing vLLM takes longer than a tiny model.

Run by `make test-vllm`, in an environment of its own; elsewhere these tests are skipped.
"""

import contextlib
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model.test_interchange import release
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from spikingbrain import InputError, SpikingBrainConfig, SpikingBrainForCausalLM, registry
from spikingbrain.families.gla_swa import GLAswaConfig, GLAswaForCausalLM
from spikingbrain.interchange import import_release

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL_ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
SIZES = {
    "vocab_size": 211,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
# Lengths that are not powers of two, and one-token prompts, which vLLM takes for tokens being decoded.
LENGTHS = (5, 37, 70, 1, 1, 21, 12, 1)
NUM_TOKENS = 12


@pytest.fixture(scope="session", autouse=True)
def _small_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_ENGINE.items():
            patch.setenv(name, value)
        # OpenMP has read its variable by now; products with other numbers of threads differ in their last bits.
        torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """vLLM reads memory that it has not written (padding), so that NaN in it says nothing about us."""


@contextlib.contextmanager
def engine(path: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM`, eager and without reuse unless the options say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True}
    llm = LLM(str(path), max_model_len=256, **{**defaults, "max_num_seqs": 4, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def ask(llm: Any, prompts: list[list[int]], **params: Any) -> list[Any]:
    """Requests that are served together."""
    from vllm import SamplingParams

    greedy = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "detokenize": False}
    wanted = SamplingParams(**{**greedy, **params})
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def make_prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def reference(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens by `generate`, a prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        made = model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        outputs.append(made[0, len(prompt) :].tolist())
    return outputs


def save(path: Path, **settings: Any) -> Path:
    """A checkpoint of our own model type."""
    torch.manual_seed(0)
    SpikingBrainForCausalLM(SpikingBrainConfig(**{**SIZES, "window": 8, **settings})).save_pretrained(path)
    return path


def save_family(name: str, path: Path, **settings: Any) -> Path:
    """A checkpoint of a family under its own model type: the authors' golden one where vLLM takes its head size.

    `settings`: of a W8ASpike release.
    """
    torch.manual_seed(0)
    if name == "metala":
        # vLLM would read the expected outputs beside the weights too.
        path.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(GOLDEN / "metala" / file, path / file)
        return path
    if name == "spikegpt":
        assert import_release(GOLDEN / "spikegpt" / "model.pth", path) == name
    elif name == "w8aspike":
        release(path.with_name("release"), 0.01, **{**SIZES, "sliding_window": 8, **settings})
        assert import_release(path.with_name("release"), path) == name
    elif name == "gla_swa":
        sizes = {**SIZES, "sliding_window": 8, "attn_layers": [1]}
        GLAswaForCausalLM(GLAswaConfig.from_dict(sizes)).save_pretrained(path)
    else:
        raise InputError(f"no tiny checkpoint of {name}; the families are {', '.join(registry.names('families'))}")
    return path


def save_qwen2(path: Path) -> Path:
    """A plain Transformer, none of ours."""
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(path)
    return path


def change_config(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **keys}))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear and window attention in parallel, softmax attention, experts, spikes."""
    return save(
        tmp_path_factory.mktemp("models") / "hybrid",
        mixers=["gla+sliding_window", "softmax", "gla+sliding_window"],
        channel_mixers=["swiglu", "moe", "swiglu"],
        moe={"num_experts": 4, "top_k": 2},
        num_hidden_layers=3,
        spiking={"neuron": "adaptive"},
    )


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return make_prompts(SIZES["vocab_size"])


@pytest.fixture(scope="session")
def expected(hybrid: Path, prompts: list[list[int]]) -> list[list[int]]:
    return reference(hybrid, prompts)
