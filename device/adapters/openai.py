"""The language of the local endpoint: requests in, answers and errors out. Pure.

Text follows OpenAI's API reference (chat completions, completions, models, errors), in the fields that its clients use. A field that would
change the answer and is not supported is refused unless it says nothing; one that is not known is ignored, as its clients send many.
"""

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from device.ports import Sampling, Written
from protocol.errors import Fault, WhimbrelError

MESSAGES_MAX: Final = 256
INPUTS_MAX: Final = 64
"""Of one request to classify, all answered by one version."""

VALUES_MAX: Final = 65_536
"""Of one input; as in a release's health plan."""

_COMPLETION_TOKENS: Final = 16
"""What OpenAI's completions take where a request names no number."""

_UNSUPPORTED: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
}
"""Fields that would change the answer, and the values with which they do not, besides null."""

_Stop = Annotated[str, Meta(min_length=1, max_length=256)]
_Values = Annotated[
    list[Annotated[float, Meta(ge=-3.4e38, le=3.4e38)]], Meta(min_length=1, max_length=VALUES_MAX)
]


class ApiError(WhimbrelError):
    """A request that gets no answer: OpenAI's error object.

    Args:
        status: Of HTTP.
        kind: OpenAI's `type`.
        name: OpenAI's `code`, for programs.
        message: For people.
        param: The field concerned.
        retry_s: When it may be asked again.
    """

    code = "endpoint.refused"
    fault = Fault.REQUEST

    def __init__(
        self,
        status: int,
        name: str,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.name = name
        self.param = param
        self.retry_s = retry_s

    def body(self) -> bytes:
        """The error object."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.name}
        return msgspec.json.encode({"error": fields})


class TextPart(Struct, frozen=True):
    """One part of a message; models here read text only."""

    type: Literal["text"]
    text: str


class Message(Struct, frozen=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def said(self) -> tuple[str, str]:
        """Role and text as templates know them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ("system" if self.role == "developer" else self.role), text


class StreamOptions(Struct, frozen=True):
    """What a stream says beside the text."""

    include_usage: bool | None = None


class TextRequest(Struct, frozen=True, kw_only=True):
    """What both kinds of text requests have."""

    model: str = ""
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=4)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the count of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, tokens_max: int | None) -> Sampling:
        """How the text goes on, with OpenAI's defaults."""
        stop = self.stop or ()
        return Sampling(
            tokens_max=tokens_max,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed & (1 << 64) - 1,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )


class ChatRequest(TextRequest, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None

    @property
    def tokens_max(self) -> int | None:
        """Longest answer; none for what the context has room for."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(TextRequest, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Meta(min_length=1, max_length=1)]

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def tokens_max(self) -> int | None:
        """Longest answer."""
        return self.max_tokens or _COMPLETION_TOKENS


class _ClassifyFields(Struct, frozen=True, kw_only=True):
    input: Annotated[list[Any], Meta(min_length=1, max_length=VALUES_MAX)]
    model: str = ""


_Kind = TypeVar("_Kind", bound=TextRequest)


def read_text_request(body: bytes, kind: type[_Kind]) -> _Kind:
    """Read a request for text.

    Raises:
        ApiError: No JSON object, a wrong or missing field, or one that is not supported.
    """
    request: _Kind = _read(body, kind)
    fields = _read(body, dict[str, Any])
    for name, neutral in _UNSUPPORTED.items():
        value = fields.get(name)
        if value is not None and value not in neutral:
            raise ApiError(400, "unsupported_parameter", f"{name} is not supported here", param=name)
    return request


def read_classify_request(body: bytes) -> tuple[str, list[list[float]]]:
    """Read `POST /v1/classify`: the model's name, and one input or several for one version.

    Raises:
        ApiError: No JSON object, or a wrong or missing field.
    """
    fields = _read(body, _ClassifyFields)
    inputs = fields.input if fields.input and isinstance(fields.input[0], list) else [fields.input]
    if len(inputs) > INPUTS_MAX:
        raise ApiError(400, "invalid_value", f"{len(inputs)} inputs, allowed are {INPUTS_MAX}", param="input")
    try:
        return fields.model, msgspec.convert(inputs, list[_Values])
    except msgspec.ValidationError as error:
        raise ApiError(400, "invalid_value", f"input: {error}", param="input") from error


class TextForm:
    """How the answer to a request for text is written down, in one piece or as events.

    Args:
        name: Its `id`.
        model: What answered.
        created: Seconds since 1970.
    """

    prefix = ""
    kind = ""
    streamed_kind = ""

    def __init__(self, name: str, model: str, created: int) -> None:
        self._head = {"id": name, "created": created, "model": model}

    def opening(self) -> tuple[bytes, ...]:
        """Events before the first piece."""
        return ()

    def piece(self, text: str | None, ending: str | None) -> bytes:
        """One event of a stream."""
        return self._streamed([{**self._said(text), "index": 0, "logprobs": None, "finish_reason": ending}])

    def usage(self, written: Written) -> bytes:
        """The last event of a stream whose client wants the counts."""
        return self._streamed([], _usage(written))

    def whole(self, text: str, written: Written) -> dict[str, Any]:
        """An answer in one piece."""
        choice = {**self._answer(text), "index": 0, "logprobs": None, "finish_reason": written.ending}
        return {**self._head, "object": self.kind, "choices": [choice], "usage": _usage(written)}

    def _streamed(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        fields = {**self._head, "object": self.streamed_kind, "choices": choices}
        return msgspec.json.encode(fields if usage is None else {**fields, "usage": usage})

    def _said(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _answer(self, text: str) -> dict[str, Any]:
        return {"text": text}


class CompletionForm(TextForm):
    """Of `POST /v1/completions`."""

    prefix = "cmpl"
    kind = streamed_kind = "text_completion"


class ChatForm(TextForm):
    """Of `POST /v1/chat/completions`."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    streamed_kind = "chat.completion.chunk"

    def opening(self) -> tuple[bytes, ...]:
        """Who speaks."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return (self._streamed([choice]),)

    def _said(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _answer(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}


def _usage(written: Written) -> dict[str, int]:
    return {
        "prompt_tokens": written.prompt_tokens,
        "completion_tokens": written.tokens,
        "total_tokens": written.prompt_tokens + written.tokens,
    }


def _read(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        _, _, path = str(error).partition("`$")
        raise ApiError(400, "invalid_value", str(error), param=path.strip(".`") or None) from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is no JSON: {error}") from error
