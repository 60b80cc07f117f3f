"""Peers timed where they are installed: llama.cpp (llama-cpp-python and gguf) and vLLM, on a Qwen2's weights."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM

from ..errors import InputError
from . import seconds

NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "vLLM": ("vllm",)}
# What vLLM's figure is taken from: a token's time is that of an answer of these many tokens more than of one.
ANSWER = 32
CONTEXT_ROUND = 256
READ_AT_ONCE = 512


def lacking(peer: str) -> list[str]:
    """The modules that `peer` needs and that are not installed."""
    return [name for name in NEEDS[peer] if find_spec(name) is None]


def write_gguf(model: Qwen2ForCausalLM, path: Path, kind: str) -> None:
    """The model as a GGUF file without vocabulary; matrices in `kind`, "bf16" or "q8_0", everything else in fp32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    stored = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        as_type = stored if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quants.quantize(values, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One sequence in llama.cpp; its matrices in `kind`, "bf16" or "q8_0". For up to `context` tokens."""

    def __init__(self, model: Qwen2ForCausalLM, kind: str, context: int):
        import llama_cpp

        self._lib: Any = llama_cpp
        self._vocab = model.config.vocab_size
        # Each message of its loader would be a line on stderr.
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, kind)
            params = llama_cpp.llama_model_default_params()
            params.use_mmap = False  # the file goes away
            self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise InputError("llama.cpp could not load the model it was given")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = -(-(context + CONTEXT_ROUND) // CONTEXT_ROUND) * CONTEXT_ROUND
        options.n_batch = options.n_ubatch = READ_AT_ONCE
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._length = 0

    def read(self, tokens: list[int]) -> Tensor:
        """The logits after `tokens`; raises `InputError` where llama.cpp refuses them."""
        for start in range(0, len(tokens), READ_AT_ONCE):
            some = tokens[start : start + READ_AT_ONCE]
            array = (self._lib.llama_token * len(some))(*some)  # the batch points to it
            batch = self._lib.llama_batch_get_one(array, len(some))
            if self._lib.llama_decode(self._context, batch):
                raise InputError(f"llama.cpp could not read {len(some)} tokens after {self._length}")
            self._length += len(some)
        logits = self._lib.llama_get_logits_ith(self._context, -1)
        return torch.from_numpy(numpy.ctypeslib.as_array(logits, (self._vocab,)).copy())

    def go_to(self, position: int) -> None:
        """Read tokens up to `position`."""
        self.read([5] * (position - self._length))

    def step(self, token: int = 5) -> Tensor:
        """The logits after one more token."""
        return self.read([token])

    def close(self) -> None:
        """Free what it holds."""
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)


class Vllm:
    """vLLM's offline engine on a model saved to a directory for it. Set its own variables (threads) outside."""

    def __init__(self, model: Qwen2ForCausalLM, context: int):
        import vllm

        self._vllm: Any = vllm
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self._engine = vllm.LLM(
                folder,
                skip_tokenizer_init=True,
                dtype=str(model.dtype).removeprefix("torch."),
                max_model_len=context + 2 * ANSWER,
                max_num_seqs=1,
                enable_prefix_caching=True,  # a prompt is read once; without bf16 arithmetic that takes minutes
            )

    def seconds_a_token(self, position: int, repeats: int = 3) -> float:
        """A token's time after a prompt of `position` tokens, of answers of many tokens and of one."""
        prompt = {"prompt_token_ids": [5] * position}

        def answer(tokens: int) -> float:
            params = self._vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            return seconds(lambda _: self._engine.generate(prompt, params, use_tqdm=False), repeats=repeats)

        return (answer(1 + ANSWER) - answer(1)) / ANSWER
