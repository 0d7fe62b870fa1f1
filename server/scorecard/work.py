"""What is asked of a worker and what it answers: messages between the process that keeps score and the one that runs the model. Pure data."""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from protocol.release import RuntimeName
from server.scorecard.items import Item, Question, Reply

FRAME_BYTES_MAX: Final = 1 << 30
"""A text of 512 tokens over a vocabulary of 256,000 has half of that."""

ROWS_MAX: Final = 512
"""Positions of one text at which two models are compared."""


class Model(Struct, frozen=True, kw_only=True):
    """A model and how it is run.

    Attributes:
        path: The file that the runtime loads; the other files of the release lie beside it.
        runtime: Which runtime.
        threads: Of one inference.
        context_tokens: Of a text model: for examples, question and answer together, at most what the model was trained for.
        adapter: Path of the low-rank adapter that the runtime adds to the weights; empty for none.
    """

    path: str
    runtime: RuntimeName
    threads: int
    context_tokens: int
    adapter: str = ""


class SpeedOrder(Struct, frozen=True, kw_only=True, tag="speed"):
    """How speed is measured.

    Attributes:
        prompt_tokens: Read at once.
        prompt_runs: How often.
        decode_tokens: Made one after the other, after each prompt; 384 in all, so that p99 has an upper bound.
        inferences: Of a classifier.
        loads: How often the file is loaded.
    """

    prompt_tokens: int = 128
    prompt_runs: int = 4
    decode_tokens: int = 96
    inferences: int = 1_000
    loads: int = 3


class MemoryOrder(Struct, frozen=True, kw_only=True, tag="memory"):
    """At which lengths of context memory is measured, ascending; those beyond what the model was trained for are left out."""

    contexts: tuple[int, ...] = (512, 2048)


class Load(Struct, frozen=True, kw_only=True, tag="load"):
    """Load the model; the first order, except before `SpeedOrder` and `MemoryOrder`, which load it themselves."""


class Ask(Struct, frozen=True, kw_only=True, tag="ask"):
    """Answer a question."""

    question: Question


class Compare(Struct, frozen=True, kw_only=True, tag="compare"):
    """Give the logits at every position of an item's solution, or of a classifier's output."""

    item: Item


class Read(Struct, frozen=True, kw_only=True, tag="read"):
    """Give the logits after each of some tokens, from an empty context on."""

    tokens: tuple[int, ...]


class Quantize(Struct, frozen=True, kw_only=True, tag="quantize"):
    """Write the model anew with the runtime's own quantizer; instead of `Load`.

    Attributes:
        out: The file; replaced when it is there.
        file_type: Which kind of file, as the runtime numbers them (`llama_ftype` of llama.h).
        embedding_type: Of the token embedding (`ggml_type` of ggml.h); None for what the kind of file brings.
    """

    out: str
    file_type: int
    embedding_type: int | None = None


Order = Load | Ask | Compare | Read | Quantize | SpeedOrder | MemoryOrder


class Done(Struct, frozen=True, kw_only=True, tag="done"):
    """The model is loaded, or the file written."""


class Replied(Struct, frozen=True, kw_only=True, tag="replied"):
    """The answer to `Ask`."""

    reply: Reply


class Rows(Struct, frozen=True, kw_only=True, tag="rows"):
    """The answer to `Compare` and `Read`: float32, row by row."""

    width: int
    data: bytes


class Speed(Struct, frozen=True, kw_only=True, tag="speeds"):
    """The answer to `SpeedOrder`.

    Attributes:
        load_ms: Of each load, the file being in the page cache.
        step_ms: Of each token, or of each inference of a classifier.
        prompt_ms: Of each prompt; none for a classifier.
        prompt_tokens: Of each prompt.
    """

    load_ms: tuple[float, ...]
    step_ms: tuple[float, ...]
    prompt_ms: tuple[float, ...] = ()
    prompt_tokens: int = 0


class ContextMemory(Struct, frozen=True, kw_only=True):
    """Memory with one length of context, filled to its end.

    Attributes:
        tokens: Length; 0 for a classifier.
        cache_bytes: By which the resident set grew when the context was made: keys and values of all tokens.
        peak_bytes: Largest resident set of the process.
    """

    tokens: int
    cache_bytes: int
    peak_bytes: int


class OperatorCost(Struct, frozen=True, kw_only=True):
    """One operator of a classifier's graph and the shapes of its tensors, as the runtime's own profile names them."""

    name: str
    kind: str
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    output_bytes: int


class Memory(Struct, frozen=True, kw_only=True, tag="memories"):
    """The answer to `MemoryOrder`.

    Attributes:
        runtime_bytes: Resident set before the model is loaded: interpreter and libraries.
        weights_bytes: By which it grew until the first inference had read all weights, without keys and values.
        contexts: With each length of context.
        operators: Of one inference of a classifier.
    """

    runtime_bytes: int
    weights_bytes: int
    contexts: tuple[ContextMemory, ...]
    operators: tuple[OperatorCost, ...] = ()


class Failed(Struct, frozen=True, kw_only=True, tag="failed"):
    """It could not be done; in one line, why."""

    detail: str


Answer = Done | Replied | Rows | Speed | Memory | Failed


class Engine(Protocol):
    """A loaded model in the worker. Every method raises `EngineError` where the model gives no finite numbers."""

    def ask(self, question: Question) -> Reply:
        """Answer; the same question always gets the same answer, whatever was asked before."""
        ...

    def rows(self, item: Item) -> npt.NDArray[np.float32]:
        """Logits of shape (positions, vocabulary or classes)."""
        ...

    def read(self, tokens: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Logits after each token, shape (tokens, vocabulary)."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...
