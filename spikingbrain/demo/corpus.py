"""Real text that every machine has, the running Python's standard library, and a tokenizer trained on it."""

import hashlib
import shutil
import sysconfig
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..files import new_directory

HELD_OUT_SHARE = 0.1
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
VOCABULARY = 1024
END, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_corpus(out: Path) -> dict[str, Any]:
    """Copy the library's .py files to `out/train` and `out/heldout`, split by the hash of their content."""
    library = Path(sysconfig.get_paths()["stdlib"])
    counts = {"train": 0, "heldout": 0}
    size = 0
    with new_directory(out) as directory:
        for file in sorted(library.rglob("*.py")):
            relative = file.relative_to(library)
            content = file.read_bytes()
            if LEFT_OUT & set(relative.parts) or not content.strip():
                continue
            split = "heldout" if is_held_out(content) else "train"
            target = directory / split / "-".join(relative.parts)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(file, target)
            counts[split] += 1
            size += len(content)
    return {"files": counts, "bytes": size}


def is_held_out(content: bytes) -> bool:
    """A file's own content decides, so that the split is the same on every machine with the same library."""
    return int.from_bytes(hashlib.sha256(content).digest()[:4]) < HELD_OUT_SHARE * 2**32


def make_tokenizer(corpus: Path, out: Path) -> dict[str, Any]:
    """Train byte-level BPE on the training half."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(sorted(map(str, (corpus / "train").glob("*.py"))), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    with new_directory(out) as directory:
        fast.save_pretrained(directory)
    return {"vocabulary": tokenizer.get_vocab_size()}
