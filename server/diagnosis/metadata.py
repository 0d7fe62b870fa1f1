"""What two GGUF files say about themselves: tokenizer, special tokens, chat template, numbers of the architecture.

Keys: ggml `docs/gguf.md`, section on standardized keys. Pure.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from protocol.tensors.gguf import ArrayValue, Scalar, read_array
from server.diagnosis.findings import Finding, finding
from server.diagnosis.models import Model

_TOKENIZER: Final = "tokenizer."
_TEMPLATE: Final = "tokenizer.chat_template"
_TOKENS: Final = "tokenizer.ggml.tokens"
_TYPES: Final = "tokenizer.ggml.token_type"
_LISTS: Final = {_TOKENS: "tokens", "tokenizer.ggml.merges": "merges"}
_EMBEDDING: Final = "token_embd.weight"
_SPECIAL_ENDINGS: Final = ("_token_id", "_token_ids", "add_bos_token", "add_eos_token", "add_sep_token")
_NORMAL_TYPE: Final = 1
"""`LLAMA_TOKEN_TYPE_NORMAL`: a token that is text; all others are special in some way."""

_TEXT_CHARS: Final = 60

Value = Scalar | ArrayValue | None


def compare_metadata(old: Model, new: Model) -> list[Finding]:
    """Findings about everything in two GGUF files that is no tensor; nothing for files of other kinds."""
    if old.kind != "gguf" or new.kind != "gguf":
        return []
    keys = list(dict.fromkeys([*old.metadata, *new.metadata]))
    changed = [key for key in keys if _content(old, key) != _content(new, key)]
    return [
        *_tokenizer(old, new, changed),
        *_special(old, new, changed),
        *_template(old, new, changed),
        *_architecture(old, new, changed),
        *_described(old, new, changed),
    ]


def _content(model: Model, key: str) -> object:
    value = model.metadata.get(key)
    return (value, read_array(model.source, value)) if isinstance(value, ArrayValue) else value


def _tokenizer(old: Model, new: Model, changed: Sequence[str]) -> Iterator[Finding]:
    cut: list[str] = []
    others: list[str] = []
    evidence: dict[str, float | str] = {}
    for key in changed:
        if not key.startswith(_TOKENIZER) or key.startswith(_TEMPLATE) or _is_special(key):
            continue
        if key in _LISTS:
            before, after = _list(old, key), _list(new, key)
            evidence |= {f"old_{_LISTS[key]}": len(before), f"new_{_LISTS[key]}": len(after)}
            evidence[f"first_other_{_LISTS[key]}"] = _first_difference(before, after)
            (cut if len(after) < len(before) else others).append(key)
        elif key != _TYPES:  # see `_special`
            others.append(key)
    counts = [
        f"{evidence[f'new_{name}']} of {evidence[f'old_{name}']} {name}"
        for key, name in _LISTS.items()
        if key in cut
    ]
    if cut:
        yield finding(
            "tokenizer.cut", f"the tokenizer has {' and '.join(counts)}", [*cut, *others], **evidence
        )
    elif others:
        first = ", ".join(_difference(old, new, key) for key in others[:3])
        yield finding("tokenizer.changed", f"tokenizer: {first}", others, **evidence)
    rows = new.tensors[_EMBEDDING][1].dims[:1] if _EMBEDDING in new.tensors else ()
    tokens = new.metadata.get(_TOKENS)
    if not cut and isinstance(tokens, ArrayValue) and rows and tokens.count < rows[0] and _TOKENS in changed:
        yield finding(
            "tokenizer.cut",
            f"{tokens.count} tokens for an embedding of {rows[0]} rows",
            [_TOKENS],
            rows=rows[0],
        )


def _special(old: Model, new: Model, changed: Sequence[str]) -> Iterator[Finding]:
    keys = [key for key in changed if _is_special(key)]
    differences = [_difference(old, new, key) for key in keys]
    if _TYPES in changed:
        tokens = _list(new, _TOKENS)
        before, after = (_list(model, _TYPES) for model in (old, new))
        normal = _NORMAL_TYPE.to_bytes(4, "little")
        moved = [
            number
            for number, (was, now) in enumerate(zip(before, after, strict=False))
            if was != now and normal in {was, now}
        ]
        if moved or len(before) == len(after):
            keys.append(_TYPES)
            named = [f"{number} {_text(tokens[number])}" for number in moved[:3] if number < len(tokens)]
            differences.append(f"{len(moved)} token(s) changed between text and special: {', '.join(named)}")
    if keys:
        yield finding("tokenizer.special", f"special tokens: {'; '.join(differences[:4])}", keys)


def _template(old: Model, new: Model, changed: Sequence[str]) -> Iterator[Finding]:
    keys = [key for key in changed if key.startswith(_TEMPLATE)]
    if not keys:
        return
    before, after = (str(model.metadata.get(keys[0], "")) for model in (old, new))
    if not after:
        yield finding("template.changed", f"the chat template is gone, it had {len(before)} characters", keys)
        return
    at = _first_difference(before, after)
    window = slice(max(0, at - 10), at + _TEXT_CHARS - 10)
    yield finding(
        "template.changed",
        f"chat template: from character {at} on {_text(before[window].encode())}, now {_text(after[window].encode())}",
        keys,
        old_characters=len(before),
        new_characters=len(after),
        first_other_character=at,
    )


def _architecture(old: Model, new: Model, changed: Sequence[str]) -> Iterator[Finding]:
    names = {model.metadata.get("general.architecture") for model in (old, new)}
    keys = [key for key in changed if key == "general.architecture" or key.partition(".")[0] in names]
    if keys:
        differences = [_difference(old, new, key) for key in keys[:4]]
        yield finding("architecture.changed", f"architecture: {'; '.join(differences)}", keys)


def _described(old: Model, new: Model, changed: Sequence[str]) -> Iterator[Finding]:
    keys = [key for key in changed if key.startswith("general.") and key != "general.architecture"]
    if keys:
        differences = [_difference(old, new, key) for key in keys[:3]]
        yield finding("metadata.changed", f"descriptions: {'; '.join(differences)}", keys)


def _is_special(key: str) -> bool:
    return key.startswith(_TOKENIZER) and key.endswith(_SPECIAL_ENDINGS)


def _list(model: Model, key: str) -> list[bytes]:
    value = model.metadata.get(key)
    return read_array(model.source, value) if isinstance(value, ArrayValue) else []


def _first_difference(before: Sequence[object], after: Sequence[object]) -> int:
    pairs = enumerate(zip(before, after, strict=False))
    return next((number for number, (old, new) in pairs if old != new), min(len(before), len(after)))


def _difference(old: Model, new: Model, key: str) -> str:
    before, after = old.metadata.get(key), new.metadata.get(key)
    if isinstance(before, ArrayValue) and isinstance(after, ArrayValue):
        lists = [_list(model, key) for model in (old, new)]
        at = _first_difference(*lists)
        return f"{key} from element {at} on ({before.count} and {after.count})"
    return f"{key} was {_shown(before)}, is {_shown(after)}"


def _shown(value: Value) -> str:
    if value is None:
        return "not there"
    if isinstance(value, ArrayValue):
        return f"a list of {value.count}"
    return (
        _text(value.encode())
        if isinstance(value, str)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _text(data: bytes) -> str:
    """A few characters of a text that is not to be trusted with a terminal."""
    text = data.decode(errors="replace")
    return repr(text if len(text) <= _TEXT_CHARS else text[: _TEXT_CHARS - 1] + "…")
