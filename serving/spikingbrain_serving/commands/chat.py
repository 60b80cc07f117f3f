"""Chat with a model in the terminal; the conversation's state is kept between turns and can be saved.

Lines that begin with a slash are commands: /save FILE, /restore FILE, /new, /quit.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from spikingbrain.errors import InputError

if TYPE_CHECKING:
    from ..conversation import Conversation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and how it answers."""
    parser.add_argument("model", metavar="DIR", type=Path, help="model directory")
    parser.add_argument("--system", help="what the model is told before the conversation")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    parser.add_argument("--max-tokens", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--max-model-len", type=int, help="tokens of the conversation (default: the model's)")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda")


def run(args: argparse.Namespace) -> None:
    """Talk until the end of the input or /quit."""
    from ..conversation import Conversation
    from ..llm import LLM
    from ..sampling import SamplingParams

    settings = {name: getattr(args, name) for name in ("max_model_len", "dtype", "device")}
    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
    conversation = Conversation(LLM(args.model, max_num_seqs=1, **settings).engine, params, args.system)
    talk(conversation, sys.stdin, sys.stdout)


def talk(conversation: "Conversation", source: TextIO, out: TextIO) -> None:
    """One line of `source` after the other; what is wrong with one does not end the conversation."""
    out.write("> ")
    out.flush()
    for line in source:
        text = line.strip()
        if text == "/quit":
            return
        try:
            _obey(conversation, text, out) if text.startswith("/") else _answer(conversation, text, out)
        except (InputError, OSError) as error:
            out.write(f"error: {error}\n")
        out.write("> ")
        out.flush()


def _answer(conversation: Any, text: str, out: TextIO) -> None:
    if not text:
        return
    for piece in conversation.ask(text):
        out.write(piece)
        out.flush()
    out.write("\n")


def _obey(conversation: Any, line: str, out: TextIO) -> None:
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/new":
        conversation.begin()
    elif command == "/save" and argument:
        conversation.save(Path(argument))
        out.write(f"saved after {conversation.num_tokens} tokens\n")
    elif command == "/restore" and argument:
        conversation.restore(Path(argument))
        out.write(f"restored after {conversation.num_tokens} tokens\n")
    else:
        out.write("commands: /save FILE, /restore FILE, /new, /quit\n")
