"""The bodies of /v1/responses, OpenAI's."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest
from ..sampling import SamplingParams
from ..structured import StructuredOutput
from .protocol import OMITTED, Body


class InputText(Body):
    """A part of a message; only text is understood."""

    type: str = "input_text"
    text: str = ""


class InputMessage(Body):
    """A message of the input."""

    type: Literal["message"] | None = None
    role: Literal["user", "system", "developer", "assistant"]
    content: str | list[InputText]

    def as_chat(self) -> dict[str, Any]:
        """As a message for the chat template; raises `InvalidRequest` for what is no text."""
        parts = [InputText(text=self.content)] if isinstance(self.content, str) else self.content
        for part in parts:
            if part.type not in ("input_text", "output_text", "text"):
                raise InvalidRequest(f"content of type {part.type!r}: only text is supported", param="input")
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in parts)}


class TextFormat(Body):
    """The form of the text."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    """`text` of a request."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Body):
    """Body of /v1/responses. `store`: keep the answer with its state (yes, if nothing is said)."""

    model: str | None = None
    input: str | list[InputMessage] = Field(min_length=1)
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    text: TextSettings | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=0)
    metadata: dict[str, str] | None = None
    return_spikes: bool | None = None

    @property
    def text_or_default(self) -> dict[str, Any]:
        """As the answer repeats it."""
        wanted = self.text.format if self.text else None
        return {"format": wanted.model_dump(by_alias=True, exclude_none=True) if wanted else {"type": "text"}}

    def messages(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation: what came before, without its instructions if there are new ones, and the input."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions is not None else []
        if first:
            before = [message for message in before if message["role"] != "system"]
        new = (
            [{"role": "user", "content": self.input}]
            if isinstance(self.input, str)
            else [message.as_chat() for message in self.input]
        )
        return [*first, *before, *new]

    def sampling_params(self) -> SamplingParams:
        """Without a limit, as many tokens as the model length leaves."""
        names = ("temperature", "top_p", "seed", "ignore_eos")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        try:
            return SamplingParams(max_tokens=self.max_output_tokens, structured=self._structured(), **given)
        except InvalidRequest as error:
            param = "max_output_tokens" if error.param == "max_tokens" else error.param
            raise InvalidRequest(str(error), param, error.code) from None

    def _structured(self) -> StructuredOutput | None:
        wanted = self.text.format if self.text else None
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.schema_ is None:
            raise InvalidRequest("json_schema needs a schema", param="text")
        return StructuredOutput("json", wanted.schema_ or {"type": "object"}, "text")


class OutputText(BaseModel):
    """A piece of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: str
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """These models do not reason apart from their answers."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens read and written, and bytes of state held in the end."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int
    state_bytes: int


class ResponseObject(BaseModel):
    """A response, as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = False
    previous_response_id: str | None
    store: bool
    temperature: float
    tool_choice: str = "none"
    tools: list[Any] = []
    top_p: float
    max_output_tokens: int | None
    text: dict[str, Any]
    usage: ResponseUsage | None


class ResponseEvent(BaseModel):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | None = OMITTED
    output_index: int | None = OMITTED
    content_index: int | None = OMITTED
    item_id: str | None = OMITTED
    item: dict[str, Any] | None = OMITTED
    part: dict[str, Any] | None = OMITTED
    delta: str | None = OMITTED
    text: str | None = OMITTED
    logprobs: list[Any] | None = OMITTED
    error: dict[str, Any] | None = OMITTED
    spikes: list[dict[str, list[int]]] | None = OMITTED
    state_bytes: int | None = OMITTED
