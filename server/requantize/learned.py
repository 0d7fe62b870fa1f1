"""Choices whose extrapolation is learned, round after round: what a file says, how far beyond it the next one aims, the file that is then chosen."""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from server.adapters.blobs import storage_errors
from server.diagnosis.weights import Floats
from server.requantize.extrapolation import STEPS, Factors, Learning, Response, leading_directions
from server.requantize.model import ModelFile, opened_gguf, rows_and_columns
from server.requantize.passes import save
from server.requantize.rounds import Round, Rounds
from server.requantize.standing import Standing, Standings
from server.requantize.student import coded_matrices
from server.requantize.work import Files


@dataclass(slots=True)
class LearnedExtrapolation:
    """From the first file to the one that is best.

    Attributes:
        rounds: Makes files, all in one place.
        new: The new model in floats.
        count: Rounds of learning, at most.
        folder: For what lies beside on the way.
        floor: Bytes that are sent whatever the price.
        standings: Where the choice stands after each round.
        divergence: Of the file that is in place.
        report: Takes lines about the progress.
        divergences: Of the first file, and after each round.
    """

    rounds: Rounds
    new: ModelFile
    count: int
    folder: Path
    floor: int
    standings: Standings
    divergence: Callable[[], float]
    report: Callable[[str], None]
    divergences: list[float] = field(default_factory=list)

    def run(self) -> Round:
        """Round after round, as long as that is better. The best file is in place then, and what is made next has its target."""
        start, kept = self.rounds.files, self.folder / "kept.gguf"
        directions = self._directions()
        standing = self._begun(kept)
        best, nearest, least = standing.best, start, min(self.divergences)
        factors = {name: self._factors(name, values) for name, values in standing.factors.items()}
        responses = {name: Response.unseen(each) for name, each in directions.items()}
        for name, shares in standing.shares.items():
            responses[name] = Response(directions[name], shares[:-1], float(shares[-1]))
        if standing.number:
            nearest = self._aimed(start, kept, factors, standing.number)
        last = standing.number if standing.is_ended else self.count
        for number in range(standing.number + 1, last + 1):
            added = self._learned(number, responses)
            for name, more in added.items():
                factors[name] = factors[name].plus(more) if name in factors else more
            self.rounds.files = self._aimed(start, kept, factors, number)
            found = self.rounds.search(self.floor)
            after = self.divergence()
            self.report(f"extrapolation, round {number}: divergence {least:.4g} to {after:.4g}")
            self.divergences.append(after)
            if after >= least:
                break
            best, nearest, least = found, self.rounds.files, after
            if number < last:
                responses = self._seen(directions, added, kept)
            shutil.copyfile(start.out, kept)
            self._keep(number, best, kept, factors, responses)
        self.standings.end(self.rounds.made, self.divergences)
        self.rounds.files = nearest
        shutil.copyfile(kept, start.out)
        return best

    def _begun(self, kept: Path) -> Standing:
        """Where the choice was when it was interrupted, or its first file; kept, and in place."""
        out, standing = self.rounds.files.out, self.standings.last()
        if standing is not None:
            self.report(f"extrapolation: goes on after round {standing.number}")
            self.rounds.made[:] = standing.made
            self.divergences += standing.divergences
            shutil.copyfile(standing.file, out)
            shutil.copyfile(out, kept)
            return standing
        best = self.rounds.search(self.floor)
        shutil.copyfile(out, kept)
        self.divergences.append(self.divergence())
        return self._keep(0, best, kept, {}, {})

    def _keep(
        self,
        number: int,
        best: Round,
        kept: Path,
        factors: Mapping[str, Factors],
        responses: Mapping[str, Response],
    ) -> Standing:
        standing = Standing(
            number=number,
            best=best,
            made=tuple(self.rounds.made),
            divergences=tuple(self.divergences),
            file=kept,
            factors={name: each.values for name, each in factors.items()},
            shares={name: np.append(each.shares, np.float32(each.rest)) for name, each in responses.items()},
        )
        self.standings.keep(standing)
        return standing

    def _factors(self, name: str, values: Floats) -> Factors:
        return Factors(values, *rows_and_columns(self.new.region(name)))

    def _aimed(self, start: Files, kept: Path, factors: Mapping[str, Factors], number: int) -> Files:
        """What the file of a round is chosen from; factors are in a folder, for those who choose."""
        place = self.folder / f"factors-{number}"
        files = replace(
            start,
            factors=place,
            directions=self.folder / "directions",
            # The better corner that a choice afresh ends in is not looked for again.
            start=kept if start.is_afresh else start.start,
        )
        with storage_errors(place):
            place.mkdir()
        for name, each in factors.items():
            save(files.factors_of(name), each.values)
        return files

    def _directions(self) -> dict[str, Floats]:
        """The leading directions of what matrices take; also in a folder, for those who choose."""
        files = replace(self.rounds.files, directions=self.folder / "directions")
        with storage_errors(self.folder):
            (self.folder / "directions").mkdir()
        names = coded_matrices(self.rounds.installed)
        sources = {files.directions_of(name): name for name in names}

        def made(path: Path) -> Floats:
            moments = files.calibration.inputs(sources[path])
            assert moments is not None
            directions = leading_directions(moments)
            save(path, directions)
            return directions

        with threadpool_limits(1), ThreadPoolExecutor(self.rounds.workers) as pool:
            found = dict(zip(sources, pool.map(made, sources), strict=True))
        return {name: found[files.directions_of(name)] for name in names}

    def _learned(self, number: int, responses: Mapping[str, Response]) -> dict[str, Factors]:
        """What the file that is in place lacks along the update."""
        files = self.rounds.files
        assert files.before is not None
        with (
            opened_gguf(files.before) as before,
            opened_gguf(files.out) as candidate,
            threadpool_limits(1),
            ThreadPoolExecutor(self.rounds.workers) as pool,
        ):
            text = files.calibration.text
            learning = Learning(self.new, before, candidate, responses, text, pool, self.report)
            return learning.run(STEPS, number)

    def _seen(
        self, directions: Mapping[str, Floats], added: Mapping[str, Factors], last: Path
    ) -> dict[str, Response]:
        """How the codes have responded to what was added, from the last file to the one that is in place."""
        files = self.rounds.files
        assert files.before is not None
        with (
            opened_gguf(files.before) as before,
            opened_gguf(last) as old,
            opened_gguf(files.out) as candidate,
            threadpool_limits(1),
            ThreadPoolExecutor(self.rounds.workers) as pool,
        ):

            def response(name: str) -> Response:
                change = self.new.floats(name) - before.floats(name)
                arrived = np.asarray(candidate.values(name) - old.values(name), np.float32)
                return Response.seen(directions[name], added[name].added(change, directions[name]), arrived)

            return dict(zip(added, pool.map(response, added), strict=True))
