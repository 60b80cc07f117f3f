"""What clients send: OpenAI's bodies, with vLLM's additional fields under vLLM's names.

Wrong types are refused; fields nobody here knows are ignored, as clients send many. Fields that are known, would change
the answer and are not supported yet are refused by name unless they say what is done anyway.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest
from ..sampling import SamplingParams
from ..structured import StructuredOutput

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
    "use_beam_search": (False,),
}
# For fields that clients expect to be absent, not null.
OMITTED: Any = Field(default=None, exclude_if=lambda value: value is None)
SAMPLING_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


class Body(BaseModel):
    """What clients send: strict types, finite numbers, further fields ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with the usage; `continuous_usage_stats`: usage in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(Body):
    """`json_schema` of a response format; `strict` is always kept."""

    # `schema` is a name that pydantic has taken.
    model_config = ConfigDict(populate_by_name=True)

    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`text`, `json_object` (any JSON object) or `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def wanted(self) -> StructuredOutput | None:
        """None for plain text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutput("json", {"type": "object"}, "response_format")
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise InvalidRequest("json_schema needs a schema", param="response_format")
        return StructuredOutput("json", self.json_schema.schema_, "response_format")


class StructuredOutputs(Body):
    """vLLM's: exactly one of a JSON schema, a regular expression, some texts, or a grammar in Lark's form."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None

    def wanted(self) -> StructuredOutput:
        """The one that is given; raises `InvalidRequest` for none or several."""
        given: dict[Any, Any] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        chosen = [(kind, value) for kind, value in given.items() if value is not None]
        if len(chosen) != 1:
            raise InvalidRequest("give one of json, regex, choice, grammar", param="structured_outputs")
        return StructuredOutput(*chosen[0])


class GenerationRequest(Body):
    """What both kinds of request share."""

    # Kept, not read, so that those which must be refused can be seen.
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    return_spikes: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    def params(self, **limits: Any) -> SamplingParams:
        """The sampling settings; raises `InvalidRequest` naming a field that is out of range or not supported."""
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise InvalidRequest(f"{name} is not supported", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        bias = _token_biases(self.logit_bias or {})
        return SamplingParams(**given, logit_bias=bias, **{"structured": self._structured(), **limits})

    def _structured(self) -> StructuredOutput | None:
        fields = (self.structured_outputs, self.response_format)
        wanted = [found for found in (field.wanted() for field in fields if field is not None) if found is not None]
        if len(wanted) > 1:
            raise InvalidRequest("response_format and structured_outputs exclude each other", param="response_format")
        return wanted[0] if wanted else None


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise InvalidRequest("logit_bias maps token ids to numbers", param="logit_bias") from None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions: `prompt` is a text, tokens, or a list of either; `session`: one it goes on from."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    session: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a choice."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def sampling_params(self) -> SamplingParams:
        """As OpenAI's default, 16 tokens if nothing is said."""
        limits = {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        return self.params(**limits, logprobs=self.logprobs)


class ContentPart(Body):
    """A part of a message; only text is understood."""

    type: str
    text: str = ""


class FunctionCall(Body):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the assistant asks for; `index` only in streams."""

    index: int | None = OMITTED
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Body):
    """One message of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionTool(Body):
    """A function that may be called; `parameters` is a JSON schema."""

    name: str = Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool of OpenAI's kind `function`."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """The function that must be called."""

    name: str


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    def sampling_params(self) -> SamplingParams:
        """Without a limit, as many tokens as the model length leaves."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        call = self._forced_call()
        return self.params(max_tokens=limit, logprobs=logprobs, **({"structured": call} if call else {}))

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def _forced_call(self) -> StructuredOutput | None:
        if not self.must_call:
            return None
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        functions = [tool.function for tool in self.tools or [] if wanted in (None, tool.function.name)]
        if not functions:
            raise InvalidRequest("tool_choice names no function of tools", param="tool_choice")
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": f.name}, "arguments": f.parameters or {"type": "object"}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for f in functions
        ]
        return StructuredOutput("json", calls[0] if len(calls) == 1 else {"anyOf": calls}, "tools")


class TokenizeRequest(Body):
    """Body of /tokenize, vLLM's: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[int]
