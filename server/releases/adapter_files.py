"""Whether a GGUF file is a low-rank adapter, and one for a certain model: what llama.cpp would refuse on a device is refused here, with its reason.

A low-rank adapter (Hu et al. 2021) says for each matrix that it changes W' = W + alpha / r * B A, with A of r rows, `….lora_a`, and B of r columns, `….lora_b`.
Keys and names: llama.cpp `convert_lora_to_gguf.py`; checks: `llama_adapter_lora_init_impl`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protocol.errors import ModelFileError
from protocol.tensors import Region
from protocol.tensors.gguf import GgufFile

DOWN: Final = ".lora_a"
UP: Final = ".lora_b"
"""Behind the name of the tensor that they change: A and B."""

TYPE_KEY: Final = "general.type"
KIND_KEY: Final = "adapter.type"
ALPHA_KEY: Final = "adapter.lora.alpha"
ARCHITECTURE_KEY: Final = "general.architecture"
INVOCATION_KEY: Final = "adapter.alora.invocation_tokens"

_EMBEDDING: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
_CONVERT: Final = "make it with llama.cpp's convert_lora_to_gguf.py, from an adapter of this model"


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter has for one matrix.

    Attributes:
        name: Of the matrix.
        down: A.
        up: B.
    """

    name: str
    down: Region
    up: Region

    @property
    def rank(self) -> int:
        """Rows of A, and columns of B."""
        return self.up.dims[-1]


def is_adapter(file: GgufFile) -> bool:
    """Whether a file calls itself an adapter, of whatever kind."""
    return file.metadata.get(TYPE_KEY) == "adapter"


def read_factors(path: Path, file: GgufFile) -> tuple[Factors, ...]:
    """The pairs of an adapter, in file order.

    Args:
        path: Named in errors.
        file: What it says about itself.

    Raises:
        ModelFileError: It is no low-rank adapter that llama.cpp takes.
    """
    if not is_adapter(file):
        raise ModelFileError(f"{path} is no adapter: {TYPE_KEY} is {_said(file, TYPE_KEY)}", hint=_CONVERT)
    if file.metadata.get(KIND_KEY) != "lora":
        raise ModelFileError(f"{path}: {KIND_KEY} is {_said(file, KIND_KEY)}, known is 'lora'", hint=_CONVERT)
    if not isinstance(file.metadata.get(ALPHA_KEY), float):
        raise ModelFileError(f"{path}: metadata has no number {ALPHA_KEY}", hint=_CONVERT)
    if INVOCATION_KEY in file.metadata:
        raise ModelFileError(
            f"{path} is meant to work from certain tokens on ({INVOCATION_KEY}), devices add an adapter for good"
        )
    tensors = {region.name: region for region in file.tensors}
    other = [name for name in tensors if not name.endswith((DOWN, UP))]
    if other:
        raise ModelFileError(
            f"{path}: the tensor {other[0]} ends with neither {DOWN} nor {UP}",
            hint="merge it into the model instead",
        )
    found = []
    for name in dict.fromkeys(name[: -len(DOWN)] for name in tensors):  # both endings have one length
        missing = [end for end in (DOWN, UP) if name + end not in tensors]
        if missing:
            raise ModelFileError(f"{path}: there is no tensor {name}{missing[0]}", hint=_CONVERT)
        found.append(Factors(name, tensors[name + DOWN], tensors[name + UP]))
    if not found:
        raise ModelFileError(f"{path}: the adapter changes nothing, it has no tensors", hint=_CONVERT)
    return tuple(found)


def check_adapter(path: Path, file: GgufFile, model: str, parts: Iterable[GgufFile]) -> None:
    """Check that an adapter is one for a model.

    Args:
        path: Of the adapter, named in errors.
        file: What it says about itself.
        model: The model's file, named in errors.
        parts: The model, and where it is split its other parts.

    Raises:
        ModelFileError: It is none, or for a model of another architecture, with other matrices or of other shapes.
    """
    factors = read_factors(path, file)
    known = list(parts)
    architecture = known[0].metadata.get(ARCHITECTURE_KEY)
    if file.metadata.get(ARCHITECTURE_KEY) != architecture:
        raise ModelFileError(
            f"{path} is for the architecture {_said(file, ARCHITECTURE_KEY)}, {model} is {architecture!r}",
            hint=_CONVERT,
        )
    tensors = {region.name: region for part in known for region in part.tensors}
    for each in factors:
        _check_shapes(path, each, model, tensors)


def _check_shapes(path: Path, factors: Factors, model: str, tensors: Mapping[str, Region]) -> None:
    matrix = tensors.get(factors.name)
    if matrix is None:
        raise ModelFileError(f"{path} changes {factors.name}, which {model} does not have", hint=_CONVERT)
    down, up = factors.down.dims, factors.up.dims
    if len(matrix.dims) < 2 or len(down) != len(matrix.dims) or len(up) != len(matrix.dims):
        raise ModelFileError(
            f"{path}: {factors.name} has {_shape(matrix.dims)}, its factors {_shape(down)} and {_shape(up)}",
            hint=_CONVERT,
        )
    *stack, rows, columns = matrix.dims
    rank = factors.rank
    wanted = ((*stack, rank, columns), (*stack, rows, rank))
    if factors.name == _EMBEDDING:
        if _OUTPUT not in tensors:
            raise ModelFileError(
                f"{path} changes {_EMBEDDING}, which is the output of {model}, too: llama.cpp dies of such an adapter",
                hint="train it without the embedding, or merge it into the model",
            )
        wanted = ((rows, rank), (columns, rank))  # rows are looked up (llm_graph_context::build_inp_embd)
    if (down, up) != wanted:
        raise ModelFileError(
            f"{path}: {factors.name} of {model} is {_shape(matrix.dims)}; factors of rank {rank} are"
            f" {_shape(wanted[0])} and {_shape(wanted[1])}, here are {_shape(down)} and {_shape(up)}",
            hint=_CONVERT,
        )


def _said(file: GgufFile, key: str) -> str:
    value = file.metadata.get(key)
    return "not given" if value is None else repr(value)[:64]


def _shape(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims))
