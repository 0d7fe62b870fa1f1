"""Where models run: on the processor or on an accelerator, with how many threads, and how much of its memory."""

import re
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from protocol.errors import RequestError

PROCESSOR: Final = "CPUExecutionProvider"
"""onnxruntime's name for the processor: whatever no provider before it takes runs there."""

_MB: Final = 1 << 20
_PROVIDER: Final = re.compile(r"[A-Za-z0-9]{1,40}ExecutionProvider")

_MEMORY_OPTIONS: Final[dict[str, dict[str, str]]] = {
    "CUDAExecutionProvider": {"gpu_mem_limit": "{bytes}", "arena_extend_strategy": "kSameAsRequested"},
    "MIGraphXExecutionProvider": {"migraphx_mem_limit": "{bytes}"},
    "ROCMExecutionProvider": {"gpu_mem_limit": "{bytes}", "arena_extend_strategy": "kSameAsRequested"},
    "TensorrtExecutionProvider": {"trt_max_workspace_size": "{bytes}"},
}
"""How a provider is told a limit of its memory (onnxruntime's documentation of each provider). The second option of the arenas: they
grow by what is asked for, and not to the next power of two."""

_BY_DEVICE_ID: Final = frozenset({*_MEMORY_OPTIONS, "CANNExecutionProvider"})
"""Providers that choose among several accelerators by the option `device_id`."""

_ENGINE_CACHES: Final = frozenset({"trt_engine_cache_enable", "trt_dump_ep_context_model"})
"""TensorRT's engines are found again by the graph and not by the weights (onnxruntime issue 6455): after an update such a
cache answers as the version before."""

_Megabytes = Annotated[int, Meta(ge=1, le=1 << 20)]
_Threads = Annotated[int, Meta(ge=1, le=256)]
_Option = str | int | float | bool


class OnnxSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[onnx]`.

    Attributes:
        providers: onnxruntime's execution providers, the preferred one first. One that cannot be had is passed over.
            Without `CPUExecutionProvider` the whole model runs on those that are named, or is refused.
        threads: Of the processor, for one answer.
        device_id: Which accelerator, where there are several.
        gpu_memory_mb_max: What a loaded model may take of the accelerator's memory; `None` for no limit.
        options: Other options of a provider, by its name.
    """

    providers: Annotated[tuple[str, ...], Meta(min_length=1, max_length=8)] = (PROCESSOR,)
    threads: _Threads = 1
    device_id: Annotated[int, Meta(ge=0, le=63)] = 0
    gpu_memory_mb_max: _Megabytes | None = None
    options: dict[str, dict[str, _Option]] = {}


class LlamaSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The table `[llama]`.

    Attributes:
        gpu_layers: Layers that run on the accelerator, those next to the output first; "all" for each of them.
        gpu_memory_mb_max: Fewer layers than that, if they would take more of the accelerator's memory; `None` for no limit.
        main_gpu: Which accelerator, where there are several.
        threads: Of the processor; `None` for half of the cores, at most two.
    """

    gpu_layers: Annotated[int, Meta(ge=0, le=10_000)] | Literal["all"] = 0
    gpu_memory_mb_max: _Megabytes | None = None
    main_gpu: Annotated[int, Meta(ge=0, le=63)] = 0
    threads: _Threads | None = None


class Compute(Struct, frozen=True, kw_only=True):
    """Where the models of this device run."""

    onnx: OnnxSettings = OnnxSettings()
    llama: LlamaSettings = LlamaSettings()

    @property
    def has_accelerator(self) -> bool:
        """Whether anything but the processor may be used."""
        return set(self.onnx.providers) != {PROCESSOR} or self.llama.gpu_layers != 0


ON_PROCESSOR: Final = Compute()


def check_onnx(settings: OnnxSettings) -> OnnxSettings:
    """The settings as they are.

    Raises:
        RequestError: They do not fit each other, or an option would have a device answer with old weights; the field is named.
    """
    for name in settings.providers:
        if not _PROVIDER.fullmatch(name):
            raise RequestError(
                f"onnx.providers: {name!r} is no execution provider",
                hint=f"they are named as in onnxruntime.get_available_providers(), {PROCESSOR} for one",
            )
    if len(set(settings.providers)) < len(settings.providers):
        raise RequestError("onnx.providers names one twice", hint="name each once, the preferred one first")
    if settings.gpu_memory_mb_max is not None and not _MEMORY_OPTIONS.keys() & set(settings.providers):
        raise RequestError(
            "onnx.gpu_memory_mb_max: none of onnx.providers can be told a limit",
            hint=f"{', '.join(_MEMORY_OPTIONS)} can; for others see onnx.options",
        )
    for provider, options in settings.options.items():
        if provider not in settings.providers:
            raise RequestError(
                f"onnx.options.{provider}: onnx.providers does not name it", hint="add it there"
            )
        for option in options.keys() & _ENGINE_CACHES:
            raise RequestError(
                f"onnx.options.{provider}.{option}: such a cache does not look at the weights, and would answer as the version before an update",
                hint="leave it out; trt_timing_cache_enable makes loading faster and is safe",
            )
    return settings


def check_llama(settings: LlamaSettings) -> LlamaSettings:
    """The settings as they are.

    Raises:
        RequestError: They do not fit each other; the field is named.
    """
    if settings.gpu_memory_mb_max is not None and settings.gpu_layers == 0:
        raise RequestError(
            "llama.gpu_memory_mb_max: no layer is to run there", hint='set gpu_layers, "all" for one'
        )
    return settings


def provider_options(settings: OnnxSettings) -> dict[str, dict[str, str]]:
    """The providers in their order, each with its options as onnxruntime takes them."""
    return {name: _options_of(name, settings) for name in settings.providers}


def _options_of(provider: str, settings: OnnxSettings) -> dict[str, str]:
    options: dict[str, str] = {}
    if provider in _BY_DEVICE_ID:
        options["device_id"] = str(settings.device_id)
    if settings.gpu_memory_mb_max is not None:
        limit = settings.gpu_memory_mb_max * _MB
        options |= {
            name: value.format(bytes=limit) for name, value in _MEMORY_OPTIONS.get(provider, {}).items()
        }
    return options | {name: _text(value) for name, value in settings.options.get(provider, {}).items()}


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
