"""Tokenizers, chat templates and the end of a chat turn travel with every checkpoint."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from spikingbrain.checkpoint import load_model, load_tokenizer
from spikingbrain.convert import convert
from spikingbrain.interchange import export, import_release
from spikingbrain_serving import LLM, SamplingParams

from .conftest import tiny_model

LINES = ["the state of a linear model does not grow", "a window forgets what is far away", "naïve café 123 déjà vu"]
TEXTS = [*LINES, "  the café does not forget 321 windows  ", "x"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def save_fast(path):
    """Byte-level BPE with a chat template, in one tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], chat_template=TEMPLATE)
    fast.save_pretrained(path)


def save_sentencepiece(path):
    """A sentencepiece `tokenizer.model` as Llama's, trained here."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(path / "tokenizer"),
        vocab_size=90,
        model_type="bpe",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (path / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))


def save_qwen2(path):
    """The class that AutoTokenizer makes of a Qwen2 directory, with its own rules for words."""
    save_fast(path)
    AutoTokenizer.from_pretrained(path).save_pretrained(path)


SAVE = {
    "fast": (LlamaConfig, LlamaForCausalLM, save_fast),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, save_qwen2),
    "sentencepiece": (LlamaConfig, LlamaForCausalLM, save_sentencepiece),
}


@pytest.fixture(params=SAVE)
def base(request, tmp_path):
    """A base with a tokenizer; its generation config ends at <|endoftext|> only."""
    make_config, make_model, save = SAVE[request.param]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = make_config(vocab_size=320, num_key_value_heads=1, eos_token_id=0, max_position_embeddings=128, **sizes)
    make_model(config).save_pretrained(tmp_path / "base")
    save(tmp_path / "base")
    return tmp_path / "base"


def test_ids_are_equal_after_convert_save_load_and_serve(base, tmp_path):
    original = AutoTokenizer.from_pretrained(base)
    expected = [original.encode(text) for text in TEXTS]
    assert len(set(map(tuple, expected))) == len(TEXTS)
    convert(base, tmp_path / "out", ["gla", "sliding_window"])
    if (base / "tokenizer.model").exists():
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    export(tmp_path / "out", tmp_path / "exported")
    load_tokenizer(tmp_path / "exported").save_pretrained(tmp_path / "exported")
    for path in ("out", "exported"):
        tokenizer = load_tokenizer(tmp_path / path)
        assert [tokenizer.encode(text) for text in TEXTS] == expected
        assert tokenizer.chat_template == TEMPLATE
    served = LLM(tmp_path / "exported").generate(TEXTS, SamplingParams(max_tokens=1))
    assert [output.prompt_token_ids for output in served] == expected


def test_a_chat_turn_ends_at_im_end_although_no_config_lists_it(tmp_path):
    released = tmp_path / "released"
    options = {"num_hidden_layers": 4, "vocab_size": 320, "eos_token_id": 0}
    tiny_model(["gla", "sliding_window"], **options).save_pretrained(tmp_path / "ours")
    save_fast(tmp_path / "ours")
    export(tmp_path / "ours", released, "gla_swa")
    (released / "generation_config.json").write_text(json.dumps({"max_new_tokens": 2048}))
    import_release(released, tmp_path / "out")
    end = load_tokenizer(tmp_path / "out").convert_tokens_to_ids("<|im_end|>")
    generation = load_model(tmp_path / "out").generation_config
    assert generation.eos_token_id == [0, end]
    assert generation.max_new_tokens == 2048
