"""Measures quantized files against the float model on held-out texts, token by token.

Of each token: how likely it is, how far the file's prediction lies from the float model's over all of the vocabulary, and whether both would choose the same.

Models run in child processes of the scorecard; what was measured is in a journal, so that nothing is measured twice. The float
model's predictions are kept on disk as 16-bit log-probabilities, normalized again when they are read: they are what "the float
model" means here, and the same for every file that is compared.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec
import numpy as np
import numpy.typing as npt

from protocol.errors import EngineError, StorageFullError
from protocol.ids import Digest, digest_of
from server.adapters.blobs import storage_errors
from server.requantize.readings import Reading, Readings
from server.requantize.texts import RUN_TOKENS, Text
from server.scorecard.items import Reply, Suite
from server.scorecard.journal import Journal, journal
from server.scorecard.keeping import runtime_version
from server.scorecard.runner import Progress, Runner
from server.scorecard.statistics import log_softmax
from server.scorecard.work import Load, Model, Quantize, Read, Rows
from server.scorecard.worker import Worker

MEASURED_BY: Final = 1
"""Grows when something else is measured, so that no journal from before is believed."""

REFERENCES_BYTES_MAX: Final = 4 << 30
"""Of predictions on disk; the ones not used for longest make room. A text of 4,088 tokens has 0.4 GB over 49,152 of vocabulary."""

ANSWER_CONTEXT_TOKENS: Final = 4096
"""For prompts and questions, which may have examples before them."""

_ROWS: Final = 64  # positions at a time: 25 MB in double precision
_DECIMALS: Final = 6

Floats = npt.NDArray[np.float64]
RunTokens = npt.NDArray[np.int32]  # (runs, RUN_TOKENS)


@dataclass(frozen=True, slots=True)
class _Reference:
    log_probabilities: npt.NDArray[np.float16]  # (positions, vocabulary), mapped
    likeliest: npt.NDArray[np.int32]


class Evaluator:
    """Measures files against one float model; a context manager.

    Args:
        reference: The float model, as GGUF.
        texts: On which files are measured; may grow by `add`.
        folder: Keeps journals and predictions; made when it is not there.
        threads: Of one inference.
        progress: Told how it goes.
    """

    def __init__(
        self, reference: Path, texts: Sequence[Text], folder: Path, threads: int, progress: Progress
    ) -> None:
        self.texts: Final = list(texts)
        self._reference = reference
        self.folder: Final = folder
        self.threads: Final = threads
        self._progress = progress
        self._opened = ExitStack()
        self._digests: dict[tuple[Path, int, int], Digest] = {}
        self._references: dict[str, _Reference] = {}
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        self._references.clear()

    def measure(
        self, candidate: Path, texts: Sequence[Text] | None = None, adapter: Path | None = None
    ) -> Readings:
        """Measure a file on texts, by default on all; with an adapter, the file with that.

        Raises:
            EngineError: llama.cpp is missing, or one of the models gives no finite numbers or has another vocabulary.
            StorageError: A file or the folder cannot be read or written.
        """
        found: Readings = {}
        with ExitStack() as used:
            kept = self._journal(candidate, adapter, used)
            name = candidate.name if adapter is None else f"{candidate.name} with {adapter.name}"
            worker: Worker | None = None
            for text in self.texts if texts is None else texts:
                key = f"reading:{text.digest}:{self._digest(self._reference)}"
                reading = kept.get(key, Reading)
                if reading is None:
                    reference = self._reference_on(text)
                    worker = worker or used.enter_context(_loaded(candidate, self.threads, adapter))
                    reading = self._read(worker, reference, text, f"{name}: {text.name}")
                    kept.put(key, reading)
                found[text.name] = reading
        return found

    def ask(self, candidate: Path, suite: Suite, adapter: Path | None = None) -> list[Reply]:
        """Ask a file, or a file with an adapter, all questions of a suite.

        Raises:
            EngineError: A question has no answer.
            StorageError: A file or the folder cannot be read or written.
        """
        with ExitStack() as used:
            kept = self._journal(candidate, adapter, used, ANSWER_CONTEXT_TOKENS)
            model = _model(candidate, self.threads, ANSWER_CONTEXT_TOKENS, adapter)
            runner = Runner(kept, lambda: model, self._progress)
            used.callback(runner.close)
            replies = runner.ask_all(suite.items, f"{candidate.name}: {suite.name}")
            if runner.missing:
                raise EngineError(f"{runner.missing[0].what}: {runner.missing[0].reason}")
            return [reply for reply in replies if reply is not None]

    def _read(self, worker: Worker, reference: _Reference, text: Text, what: str) -> Reading:
        nll, kl, same = [], [], []
        runs = text.runs()
        for number, rows in enumerate(self._logits(worker, runs, what)):
            if rows.shape[1] != reference.log_probabilities.shape[1]:
                raise EngineError(
                    f"{what}: {rows.shape[1]} tokens in the vocabulary,"
                    f" the float model has {reference.log_probabilities.shape[1]}"
                )
            first = number * (RUN_TOKENS - 1)
            for start in range(0, len(rows), _ROWS):
                part = log_softmax(rows[start : start + _ROWS])
                place = slice(first + start, first + start + len(part))
                theirs = log_softmax(reference.log_probabilities[place].astype(np.float32))
                kl.append(np.maximum((np.exp(theirs) * (theirs - part)).sum(axis=1), 0))
                following = runs[number, start + 1 : start + 1 + len(part)]
                nll.append(-part[np.arange(len(part)), following])
                same.append(part.argmax(axis=1) == reference.likeliest[place])
        return Reading(nll=_rounded(nll), kl=_rounded(kl), same=tuple(np.concatenate(same).tolist()))

    def _logits(self, worker: Worker, runs: RunTokens, what: str) -> Iterator[npt.NDArray[np.float32]]:
        """Logits before each token of a run but the first, run by run."""
        for number, run in enumerate(runs):
            try:
                answer = worker.ask(Read(tokens=tuple(run[:-1].tolist())))
            except EngineError as error:
                raise EngineError(f"{what}: {error.message}", hint=error.hint) from error
            assert isinstance(answer, Rows)
            yield np.frombuffer(answer.data, np.float32).reshape(-1, answer.width)
            self._progress(number + 1, len(runs), what)

    def _reference_on(self, text: Text) -> _Reference:
        """The float model's predictions, from disk if they are there."""
        name = f"{self._digest(self._reference)[:32]}-{text.digest[:32]}"
        if name not in self._references:
            place = self.folder / f"reference-{name}.npy"
            top = _likeliest(place)
            if not place.exists() or not top.exists():
                self._predict(text, place, top)
            with storage_errors(place):
                os.utime(place)
                self._references[name] = _Reference(np.load(place, mmap_mode="r"), np.load(top))
        return self._references[name]

    def _predict(self, text: Text, place: Path, top: Path) -> None:
        runs = text.runs()
        with _loaded(self._reference, self.threads) as worker:
            self._write(self._logits(worker, runs, f"float model: {text.name}"), len(runs), place, top)

    def _write(self, runs: Iterator[npt.NDArray[np.float32]], count: int, place: Path, top: Path) -> None:
        partial = place.with_suffix(".partial")
        likeliest = []
        out: np.memmap[tuple[int, int], np.dtype[np.float16]] | None = None
        for number, rows in enumerate(runs):
            if out is None:
                shape = (count * len(rows), rows.shape[1])
                self._make_room(2 * shape[0] * shape[1])
                with storage_errors(partial):
                    out = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
            first = number * len(rows)
            for start in range(0, len(rows), _ROWS):
                part = log_softmax(rows[start : start + _ROWS])
                out[first + start : first + start + len(part)] = part
                likeliest.append(part.argmax(axis=1).astype(np.int32))
        assert out is not None  # there are two runs at least
        with storage_errors(partial):
            out.flush()
            np.save(top, np.concatenate(likeliest))
            partial.replace(place)

    def _make_room(self, needed: int) -> None:
        """Remove predictions that were not used for long, so that all of them stay within their limit."""
        if needed > REFERENCES_BYTES_MAX:
            raise StorageFullError(
                f"the float model's predictions on one text are {needed:,} bytes, allowed are {REFERENCES_BYTES_MAX:,}"
            )
        with storage_errors(self.folder):
            known = sorted(self.folder.glob("reference-*.npy"), key=lambda path: path.stat().st_mtime)
            in_use = {self.folder / f"reference-{name}.npy" for name in self._references}
            total = sum(path.stat().st_size for path in known) + needed
            for path in known:
                if total > REFERENCES_BYTES_MAX and path not in in_use:
                    total -= path.stat().st_size
                    path.unlink()
                    _likeliest(path).unlink(missing_ok=True)

    def _digest(self, path: Path) -> Digest:
        """Of a file; reckoned once as long as it is the same."""
        with storage_errors(path):
            status = path.stat()
            key = (path, status.st_mtime_ns, status.st_size)
            if key not in self._digests:
                with path.open("rb") as file:
                    self._digests[key] = Digest(hashlib.file_digest(file, "sha256").hexdigest())
        return self._digests[key]

    def _journal(
        self, model: Path, adapter: Path | None, used: ExitStack, context_tokens: int = RUN_TOKENS
    ) -> Journal:
        identity: dict[str, object] = {
            "measured_by": MEASURED_BY,
            "file": self._digest(model),
            "runtime_version": runtime_version("llama"),
            "threads": self.threads,
            "context_tokens": context_tokens,
        }
        if adapter is not None:
            identity["adapter"] = self._digest(adapter)
        return used.enter_context(journal(self.folder, digest_of(msgspec.json.encode(identity)), identity))


def _loaded(path: Path, threads: int, adapter: Path | None = None) -> Worker:
    """A worker that has loaded a model to read texts."""
    worker = Worker(_model(path, threads, RUN_TOKENS, adapter))
    try:
        worker.ask(Load())
    except EngineError as error:
        worker.close()
        raise EngineError(f"{path}: {error.message}", hint=error.hint) from error
    return worker


def quantize(model: Path, out: Path, file_type: int, embedding_type: int | None, threads: int) -> None:
    """Write a float model with llama.cpp's own quantizer.

    Raises:
        EngineError: llama.cpp is missing or refuses.
    """
    with Worker(_model(model, threads, RUN_TOKENS)) as worker:
        worker.ask(Quantize(out=str(out.absolute()), file_type=file_type, embedding_type=embedding_type))


def _likeliest(predictions: Path) -> Path:
    return predictions.with_name(predictions.name.replace("reference-", "likeliest-"))


def _model(path: Path, threads: int, context_tokens: int, adapter: Path | None = None) -> Model:
    return Model(
        path=str(path.absolute()),
        runtime="llama",
        threads=threads,
        context_tokens=context_tokens,
        adapter="" if adapter is None else str(adapter.absolute()),
    )


def _rounded(parts: Sequence[Floats]) -> tuple[float, ...]:
    return tuple(np.round(np.concatenate(parts), _DECIMALS).tolist())
