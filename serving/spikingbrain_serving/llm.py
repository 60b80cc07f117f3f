"""The Python interface, in the shape of vLLM's `LLM`."""

from collections.abc import Sequence as Collection
from pathlib import Path
from typing import Any

from .config import EngineConfig
from .errors import RequestFailed
from .loading import load_engine
from .prompts import Message, Prompt, encode_chat, tokens_of
from .sampling import SamplingParams
from .sequence import RequestOutput

Params = SamplingParams | Collection[SamplingParams] | None


class LLM:
    """A model directory, loaded; `settings` are `EngineConfig`'s. Raises `InputError` if either is wrong."""

    def __init__(self, model: str | Path, **settings: Any):
        self.engine = load_engine(model, EngineConfig(**settings))

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(self, prompts: Prompt | Collection[Prompt], sampling_params: Params = None) -> list[RequestOutput]:
        """Complete prompts, each a text or a list of tokens, together; outputs are in the prompts' order.

        `sampling_params`: one for all, or one for each. Raises `InvalidRequest` before anything is computed, and
        `RequestFailed` if one could not be computed.
        """
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        batch: list[Any] = [prompts] if single else list(prompts)
        tokens = [tokens_of(self.engine.tokenizer, prompt) for prompt in batch]
        outputs = self._run(tokens, sampling_params)
        for output, prompt in zip(outputs, batch, strict=True):
            output.prompt = prompt if isinstance(prompt, str) else None
        return outputs

    def chat(
        self, messages: list[Message] | list[list[Message]], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """Answer one conversation or several, through the model's chat template; raises as `generate`."""
        batch: list[Any] = [messages] if messages and isinstance(messages[0], dict) else messages
        tokens = [encode_chat(self.engine.tokenizer, conversation) for conversation in batch]
        return self._run(tokens, sampling_params)

    def _run(self, tokens: list[list[int]], given: Params) -> list[RequestOutput]:
        params = _one_each(given, len(tokens))
        for prompt, own in zip(tokens, params, strict=True):
            self.engine.check(prompt, own)
        for index, (prompt, own) in enumerate(zip(tokens, params, strict=True)):
            self.engine.add_request(str(index), prompt, own)
        try:
            outputs = self._collect()
        finally:
            for request_id in self.engine.request_ids:
                self.engine.abort(request_id)
        return [outputs[str(index)] for index in range(len(tokens))]

    def _collect(self) -> dict[str, RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        while self.engine.has_work:
            for new in self.engine.step():
                if new.outputs[0].finish_reason == "error":
                    raise RequestFailed(f"prompt {new.request_id}: {new.outputs[0].error}")
                if new.request_id in outputs:
                    outputs[new.request_id].extend(new)
                else:
                    outputs[new.request_id] = new
        return outputs


def _one_each(given: Params, num: int) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * num
    if len(given) != num:
        raise ValueError(f"{len(given)} sampling_params for {num} prompts")
    return list(given)
