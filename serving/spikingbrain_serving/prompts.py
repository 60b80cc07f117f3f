"""From what a user sends, text, tokens or a conversation, to the tokens the engine computes."""

from typing import Any

from .errors import InvalidRequest

Message = dict[str, Any]
Prompt = str | list[int]


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text; raises `InvalidRequest` for text that is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the prompt is not valid Unicode: {error.reason}", param="prompt") from None
    return tokenizer.encode(text, add_special_tokens=add_special_tokens)


def tokens_of(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The tokens of a prompt that is a text or tokens already."""
    return encode(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


def encode_chat(tokenizer: Any, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
    """The tokens of `render_chat`."""
    return encode(tokenizer, render_chat(tokenizer, messages, tools), add_special_tokens=False)


def render_chat(tokenizer: Any, messages: list[Message], tools: list[Message] | None = None) -> str:
    """The text of a conversation up to where the assistant speaks next; `tools` are functions it may call.

    Raises `InvalidRequest` if the model has no chat template or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    if not messages:
        raise InvalidRequest("messages is empty: at least one message is needed", param="messages")
    # A library of chat templates only: served completions do without it.
    from jinja2 import TemplateError

    flat = [{**message, "content": _text_of(message)} for message in messages]
    try:
        return tokenizer.apply_chat_template(flat, tools=tools, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    for part in content:
        if part.get("type") != "text":
            raise InvalidRequest(f"content of type {part.get('type')!r}: only text is supported", param="messages")
    return "".join(part["text"] for part in content)
