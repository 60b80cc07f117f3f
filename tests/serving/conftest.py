"""A tiny model with random weights and a byte-level tokenizer with a chat template, saved as a checkpoint."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from spikingbrain import SpikingBrainConfig, SpikingBrainForCausalLM
from spikingbrain.checkpoint import load_model
from spikingbrain_serving.loading import packed

# Two logits so close may change places with the rounding of a sum.
TIE = 1e-4
END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'forbidden' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog while it rains and the state does not grow " * 3
PROMPTS = [
    "the quick brown fox jumps over the lazy dog and then some more of it",
    "a",
    "while it rains, naïve 鳥 fly 🐦",
    "does the state grow? the state does not grow. the quick brown fox",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text has tokens, most characters outside ASCII are several of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE)


def save_model(path: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> Path:
    """A checkpoint; its weights are large enough for outputs that do not repeat themselves."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    defaults = {**sizes, "num_key_value_heads": 2, "window": 8, "mixers": ["gla", "sliding_window"]}
    config = SpikingBrainConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        **{**defaults, **settings},
    )
    SpikingBrainForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def generate(
    model_dir: Path,
    prompts: list[list[int]],
    num_tokens: int,
    *,
    ignore_eos: bool = False,
    dtype: str = "auto",
    pack: str = "auto",
) -> list[list[int]]:
    """What `generate` of transformers makes of each prompt alone, greedily, with the weights packed as the engine's."""
    model = packed(load_model(model_dir, dtype), pack)
    if ignore_eos:
        model.generation_config.eos_token_id = None
    outputs = []
    for prompt in prompts:
        output = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def num_ties(model_dir: Path, prompts: list[list[int]], outputs: list[list[int]], expected: list[list[int]]) -> int:
    """How many outputs part from what was expected, all of them where the two tokens' logits are within `TIE`."""
    model, ties = load_model(model_dir), 0
    for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
        parted = next((i for i, pair in enumerate(zip(output, tokens, strict=True)) if pair[0] != pair[1]), None)
        if parted is not None:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens[:parted]])).logits[0, -1]
            gap = abs(float(logits[output[parted]] - logits[tokens[parted]]))
            assert gap <= TIE, f"{output} parts from {tokens} at {parted}, where the logits differ by {gap}"
            ties += 1
    return ties


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def softmax_model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "softmax", tokenizer, mixers=["softmax"])


@pytest.fixture(scope="session")
def prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="session")
def reference(model_dir: Path, prompt_tokens: list[list[int]]) -> list[list[int]]:
    """24 greedy tokens after each of PROMPTS, by `generate`."""
    return generate(model_dir, prompt_tokens, 24)
