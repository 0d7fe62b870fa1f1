"""Files that are chosen: what they weigh, what they promise, and what is refused."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from benchmarks.gguf_files import read_stored, read_weights, start_gguf, write_gguf
from protocol.delta.reader import DeltaReader
from protocol.delta.writer import make_delta
from protocol.errors import ModelFileError, RequestError
from protocol.tensors import BytesSource
from server.requantize.calibration import Calibration, calibrate
from server.requantize.choice import choose
from server.requantize.codes import LINEAR_LAYOUTS
from server.requantize.controls import write_nearest
from server.requantize.correction import measure_divergence, measure_slopes
from server.requantize.model import opened_gguf
from server.requantize.pairing import changed_codes
from server.requantize.portions import Portion
from server.requantize.provenance import write_record
from server.requantize.settings import Settings
from server.requantize.weighing import delta_bytes
from tests.models import write_language_model
from tests.server.requantize.samples import TYPES, choose_in, quantized, quiet, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two float versions, `before` and `new`, and `installed`, the first one rounded."""
    folder = tmp_path_factory.mktemp("models")
    before = write_language_model(folder / "before.gguf", 1)
    write_language_model(folder / "new.gguf", 1, noise=0.02)
    quantized(before, folder / "installed.gguf")
    return folder


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return calibrate(
        folder / "new.gguf", tokens(1), folder / "calibration", quiet, sequences=8, sequence_tokens=64
    )


@pytest.mark.parametrize("moves_scales", [False, True])
def test_a_file_has_the_codes_and_scales_that_were_counted_and_its_delta_is_as_long_as_said(
    folder: Path, calibration: Calibration, tmp_path: Path, *, moves_scales: bool
) -> None:
    out = tmp_path / "out.gguf"
    chosen = choose_in(folder, calibration, out, price=1e-8, moves_scales=moves_scales)
    assert 0 < chosen.objective_after < chosen.objective_before
    old, new = (folder / "installed.gguf").read_bytes(), out.read_bytes()
    patch = bytearray()

    class Sink:
        def write(self, data: bytes, /) -> None:
            patch.extend(data)

    make_delta(BytesSource(old), BytesSource(new), Sink(), in_place=None)  # as a server does
    assert len(patch) == chosen.delta_bytes
    reader = DeltaReader(BytesSource(old))
    assert b"".join(piece.data for piece in reader.feed(patch)) == new
    reader.finish()
    changed = scales = 0
    stored = {each.name: each for each in read_stored(out)}
    for before in read_stored(folder / "installed.gguf"):
        after = stored[before.name]
        assert after.kind == before.kind
        if before.kind == TYPES.Q4_0:
            blocks = [np.asarray(each.data).reshape(-1, 18) for each in (before, after)]
            moved = int((blocks[0][:, :2] != blocks[1][:, :2]).any(axis=1).sum())
            assert moved == chosen.scales[before.name]
            scales += moved
            nibbles = [np.stack([each[:, 2:] & 15, each[:, 2:] >> 4]) for each in blocks]
            count = int(np.count_nonzero(nibbles[0] != nibbles[1]))
            assert count == chosen.changed[before.name]
            changed += count
    assert changed > 0
    assert (scales > 0) is moves_scales


def test_scales_stay_unless_they_may_move_and_less_is_lost_where_they_move(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    still, moving = (
        choose_in(folder, calibration, tmp_path / "out.gguf", price=1e-8, moves_scales=each)
        for each in (False, True)
    )
    assert not any(still.scales.values())
    assert any(moving.scales.values())
    assert moving.scales["token_embd.weight"] == 0  # Q8_0
    assert moving.objective_after < 0.95 * still.objective_after


def test_what_begins_where_another_choice_ended_begins_with_its_scales(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    first = choose_in(folder, calibration, tmp_path / "first.gguf", price=1e-8, moves_scales=True)
    again = choose(
        folder / "new.gguf",
        folder / "installed.gguf",
        calibration,
        Settings(price=1e-8, moves_scales=True, workers=1),
        tmp_path / "again.gguf",
        quiet,
        start=tmp_path / "first.gguf",
    )
    assert again.objective_before == pytest.approx(first.objective_before, rel=1e-4)
    assert again.objective_after == pytest.approx(first.objective_after, rel=1e-2)
    assert sum(again.scales.values()) == pytest.approx(sum(first.scales.values()), rel=0.1)


def test_floats_are_the_new_ones(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    changed = tmp_path / "new.gguf"
    weights = read_weights(folder / "new.gguf")
    weights["output_norm.weight"] = weights["output_norm.weight"] + np.float32(0.5)
    tensors = read_stored(folder / "new.gguf")
    with_norm = [
        type(each)(each.name, weights[each.name], each.kind) if each.name == "output_norm.weight" else each
        for each in tensors
    ]
    write_gguf(folder / "new.gguf", changed, with_norm, {})
    out = tmp_path / "out.gguf"
    choose(changed, folder / "installed.gguf", calibration, Settings(price=1e3, workers=1), out, quiet)
    assert np.array_equal(read_weights(out)["output_norm.weight"], weights["output_norm.weight"])


def test_at_a_price_that_nothing_is_worth_the_installed_codes_stay(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    chosen = choose_in(folder, calibration, out, price=1e6)
    assert not any(chosen.changed.values())
    assert out.read_bytes() == (folder / "installed.gguf").read_bytes()


def test_what_costs_nothing_is_better_than_what_costs_much(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    chosen = [
        choose_in(folder, calibration, tmp_path / f"{price}.gguf", price=price) for price in (0.0, 1e-7, 1e-5)
    ]
    for cheap, dear in itertools.pairwise(chosen):
        assert cheap.objective_after < dear.objective_after
        assert cheap.delta_bytes > dear.delta_bytes
    before = {each.objective_before for each in chosen}
    assert len(before) == 1


@pytest.mark.parametrize("metric", ["outputs", "weights"])
def test_a_budget_is_used_and_not_passed(
    folder: Path, calibration: Calibration, tmp_path: Path, metric: str
) -> None:
    chosen = choose_in(folder, calibration, tmp_path / "out.gguf", budget_bytes=2500, metric=metric)
    assert 0.9 * 2500 < chosen.delta_bytes <= 2500
    assert chosen.rounds[-1] == (chosen.price, chosen.delta_bytes)


def test_outputs_are_kept_better_by_the_metric_that_looks_at_them(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    own, trap = (
        choose_in(folder, calibration, tmp_path / f"{metric}.gguf", budget_bytes=2500, metric=metric)
        for metric in ("outputs", "weights")
    )
    again = choose(
        folder / "new.gguf",
        tmp_path / "weights.gguf",
        calibration,
        Settings(price=1e6, workers=1),
        tmp_path / "again.gguf",
        quiet,
    )
    assert own.objective_after < again.objective_before
    assert trap.objective_after < trap.objective_before


def test_the_number_of_processes_changes_nothing(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    files = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.gguf"
        choose_in(folder, calibration, out, price=1e-7, workers=workers)
        files.append(out.read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", [TYPES.Q4_1, TYPES.Q5_0, TYPES.Q8_0])
def test_other_quantizations_are_chosen_as_well(
    folder: Path, calibration: Calibration, tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    installed = quantized(folder / "before.gguf", tmp_path / "installed.gguf", kind)
    chosen = choose(
        folder / "new.gguf",
        installed,
        calibration,
        Settings(price=1e-9, workers=1),
        tmp_path / "out.gguf",
        quiet,
    )
    assert chosen.objective_after < 0.9 * chosen.objective_before
    assert chosen.kept == ()


def test_the_target_lies_beyond_the_new_weights_where_that_is_asked_for(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    weights = {name: read_weights(folder / f"{name}.gguf") for name in ("before", "new")}
    distances = []
    for factor in (0.0, 1.0):
        out = tmp_path / f"{factor}.gguf"
        settings = Settings(price=0.0, extrapolation=factor, metric="weights", workers=1)
        choose(
            folder / "new.gguf",
            folder / "installed.gguf",
            calibration,
            settings,
            out,
            quiet,
            before=folder / "before.gguf",
        )
        chosen = read_weights(out)
        distances.append(
            sum(
                float(np.square(chosen[name] - (2 * weights["new"][name] - weights["before"][name])).sum())
                for name in chosen
                if "ffn" in name
            )
        )
    assert distances[1] < distances[0]
    with pytest.raises(RequestError, match="installed version in floats is needed"):
        choose_in(folder, calibration, tmp_path / "none.gguf", price=0.0, extrapolation=1.0)


def test_a_correction_brings_the_candidate_nearer_to_the_float_model(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    plain = choose_in(folder, calibration, tmp_path / "plain.gguf", budget_bytes=2500)
    chosen = choose_in(
        folder, calibration, tmp_path / "out.gguf", budget_bytes=2500, corrections=1, trust=0.1
    )
    assert plain.divergences == ()
    assert len(chosen.divergences) == 2
    assert chosen.divergences[1] < 0.9 * chosen.divergences[0]
    assert chosen.delta_bytes <= 2500
    assert {path.name for path in tmp_path.iterdir()} == {"plain.gguf", "out.gguf"}


def test_a_correction_that_goes_too_far_is_shortened(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    wild = choose_in(folder, calibration, tmp_path / "out.gguf", price=1e-7, corrections=1, trust=1000.0)
    assert len(wild.rounds) > 2
    assert wild.divergences[1] < wild.divergences[0]


def test_a_correction_that_changes_nothing_ends_it(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    chosen = choose_in(folder, calibration, out, price=1e6, corrections=3)
    assert len(chosen.divergences) == 1
    assert out.read_bytes() == (folder / "installed.gguf").read_bytes()


def test_slopes_agree_with_finite_differences_of_the_divergence(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    candidate, new = folder / "before.gguf", folder / "new.gguf"
    slopes = measure_slopes(new, candidate, calibration, tmp_path / "slopes", quiet)
    name = "blk.0.ffn_up.weight"
    slope = slopes.of(name)
    assert slope is not None
    place = np.unravel_index(np.abs(slope).argmax(), slope.shape)
    sides = []
    for step in (-0.02, 0.02):
        moved = []
        for each in read_stored(candidate):
            data = np.array(each.data)
            if each.name == name:
                data[place] += step
            moved.append(type(each)(each.name, data, each.kind))
        write_gguf(candidate, tmp_path / "moved.gguf", moved, {})
        sides.append(measure_divergence(new, tmp_path / "moved.gguf", calibration, tmp_path / "look", quiet))
    assert -(sides[1] - sides[0]) / 0.04 == pytest.approx(float(slope[place]), rel=0.03)
    assert slopes.of("token_embd.weight") is None


def test_a_divergence_of_some_runs_is_that_of_a_calibration_with_these(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    new, candidate = folder / "new.gguf", folder / "installed.gguf"
    runs = calibration.runs()[::2]
    fewer = calibrate(
        new, runs.reshape(-1), tmp_path / "calibration", quiet, sequences=len(runs), sequence_tokens=64
    )
    look = tmp_path / "look"
    some = measure_divergence(new, candidate, calibration, look, quiet, runs_max=len(runs))
    assert some == pytest.approx(measure_divergence(new, candidate, fewer, look, quiet), rel=1e-6)
    every = measure_divergence(new, candidate, calibration, look, quiet, runs_max=1000)
    assert every == measure_divergence(new, candidate, calibration, look, quiet) != some


def test_a_start_is_pulled_back_to_what_is_installed(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    rounded = quantized(folder / "new.gguf", tmp_path / "rounded.gguf")
    chosen = choose(
        folder / "new.gguf",
        folder / "installed.gguf",
        calibration,
        Settings(price=1e6, workers=1),
        tmp_path / "out.gguf",
        quiet,
        start=rounded,
    )
    assert not any(chosen.changed.values())


def test_what_begins_afresh_ends_near_what_is_installed_if_that_is_the_price(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    free, priced, dear = (
        choose_in(folder, calibration, tmp_path / f"{price}.gguf", price=price, is_afresh=True)
        for price in (0.0, 1e-7, 1e6)
    )
    assert not any(dear.changed.values())
    assert free.objective_after < priced.objective_after < dear.objective_after
    assert free.delta_bytes > priced.delta_bytes > dear.delta_bytes
    assert free.objective_before == pytest.approx(dear.objective_before)
    installed = choose_in(folder, calibration, tmp_path / "installed.gguf", price=0.0)
    assert free.objective_after < 1.1 * installed.objective_after


def test_the_record_says_from_what_and_how(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    chosen = choose_in(folder, calibration, out, price=1e-8)
    record = json.loads(write_record(out, chosen).read_text())
    for name, path in (
        ("new", folder / "new.gguf"),
        ("installed", folder / "installed.gguf"),
        ("result", out),
    ):
        assert record["sources"][name] == hashlib.sha256(path.read_bytes()).hexdigest()
    runs = np.asarray(calibration.runs())
    assert record["sources"]["calibration_tokens"] == hashlib.sha256(runs.tobytes()).hexdigest()
    assert record["settings"]["price"] == 1e-8
    assert record["delta_bytes"] == chosen.delta_bytes


def test_metadata_is_the_new_models_but_for_what_says_how_it_is_quantized(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    paths = {}
    for name, changes in (
        ("new", {"general.name": "a longer name than before", "general.file_type": 32}),
        ("installed", {"general.name": "old", "general.file_type": 2}),
    ):
        paths[name] = tmp_path / f"{name}.gguf"
        writer = start_gguf(folder / f"{name}.gguf", paths[name], {})
        for key, value in changes.items():
            add = writer.add_string if isinstance(value, str) else writer.add_uint32
            add(key, value)
        for tensor in read_stored(folder / f"{name}.gguf"):
            writer.add_tensor(tensor.name, np.ascontiguousarray(tensor.data), raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    out = tmp_path / "out.gguf"
    choose(paths["new"], paths["installed"], calibration, Settings(price=1e6, workers=1), out, quiet)
    fields = gguf.GGUFReader(out).fields
    assert fields["general.name"].contents() == "a longer name than before"
    assert fields["general.file_type"].contents() == 2
    before, after = read_weights(paths["installed"]), read_weights(out)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_files_that_do_not_belong_together_are_refused(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    out, settings = tmp_path / "out.gguf", Settings(price=1e-8, workers=1)
    new, installed = folder / "new.gguf", folder / "installed.gguf"
    other = tmp_path / "vocabulary.gguf"
    other.write_bytes(new.read_bytes().replace("▁B".encode(), "▁Z".encode()))
    with pytest.raises(ModelFileError, match=r"tokenizer.ggml.tokens differs .*ordinary delta"):
        choose(other, installed, calibration, settings, out, quiet)
    with pytest.raises(ModelFileError, match=r"is q8_0, floats are needed .*before quantization"):
        choose(installed, installed, calibration, settings, out, quiet)
    part = tmp_path / "part.gguf"
    write_gguf(new, part, [each for each in read_stored(new) if "ffn_up" not in each.name], {})
    with pytest.raises(ModelFileError, match=r"no tensor blk.0.ffn_up.weight, which .*whole model"):
        choose(part, installed, calibration, settings, out, quiet)
    with pytest.raises(ModelFileError, match="no tensor has codes that can be chosen"):
        choose(new, new, calibration, settings, out, quiet)
    with pytest.raises(RequestError, match="no such file"):
        choose(tmp_path / "none.gguf", installed, calibration, settings, out, quiet)
    with pytest.raises(ModelFileError, match="magic is not 'GGUF'"):
        choose(Path(__file__), installed, calibration, settings, out, quiet)
    for wrong in (
        Settings(),
        Settings(price=1.0, budget_bytes=9),
        Settings(price=-1.0),
        Settings(budget_bytes=0),
    ):
        with pytest.raises(RequestError):
            choose(new, installed, calibration, wrong, out, quiet)
    with pytest.raises(RequestError, match="the budget is 40"):
        choose(new, installed, calibration, Settings(budget_bytes=40, workers=1), out, quiet)
    assert sorted(tmp_path.iterdir()) == [part, other]


def test_damaged_weights_are_named(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    tensors = read_stored(folder / "new.gguf")
    damaged = [
        type(each)(
            each.name,
            np.where(np.arange(each.data.size).reshape(each.data.shape) == 7, np.nan, each.data),
            each.kind,
        )
        if each.name == "blk.1.ffn_up.weight"
        else each
        for each in tensors
    ]
    write_gguf(folder / "new.gguf", bad, damaged, {})
    with pytest.raises(ModelFileError, match=r"blk.1.ffn_up.weight: .* no numbers"):
        choose(
            bad,
            folder / "installed.gguf",
            calibration,
            Settings(price=0.0, workers=1),
            tmp_path / "o",
            quiet,
        )


@pytest.mark.llama
def test_what_was_chosen_runs_in_llama_cpp(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    out = tmp_path / "out.gguf"
    choose_in(folder, calibration, out, price=1e-8)
    llama = llama_cpp.Llama(str(out), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    llama.eval([1, 40, 50, 60])
    assert np.isfinite(llama.scores[:4]).all()
    llama.close()


@pytest.fixture(scope="module")
def sure_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `folder`, of models that are sure of what they say: labels drawn from them tell less of where codes matter."""
    folder = tmp_path_factory.mktemp("sure")
    for name, noise in (("before", 0.0), ("new", 0.02)):
        source = write_language_model(folder / "source.gguf", 1, noise=noise)
        tensors = [
            replace(each, data=4 * each.data) if each.name == "output_norm.weight" else each
            for each in read_stored(source)
        ]
        write_gguf(source, folder / f"{name}.gguf", tensors, {})
    quantized(folder / "before.gguf", folder / "installed.gguf")
    return folder


def test_a_distilled_file_says_more_nearly_what_the_new_model_does_and_keeps_to_its_budget(
    sure_folder: Path, tmp_path: Path
) -> None:
    calibration = calibrate(
        sure_folder / "new.gguf", tokens(1), tmp_path, quiet, sequences=8, sequence_tokens=64
    )
    budget, plain, out = 12_000, tmp_path / "plain.gguf", tmp_path / "out.gguf"
    undistilled = choose_in(sure_folder, calibration, plain, budget_bytes=budget)
    chosen = choose_in(sure_folder, calibration, out, budget_bytes=budget, distillation=60)
    before, after = chosen.divergences
    assert after < before
    for file, divergence in ((plain, before), (out, after)):
        seen = measure_divergence(
            sure_folder / "new.gguf", file, calibration, tmp_path / "look", quiet, workers=1
        )
        assert seen == pytest.approx(divergence)
    assert chosen.delta_bytes <= budget
    assert chosen.delta_bytes == delta_bytes(sure_folder / "installed.gguf", out)
    assert chosen.changed == _changed(sure_folder / "installed.gguf", out)
    assert chosen.objective_after >= undistilled.objective_after  # it is the least of that
    assert undistilled.sources.distilled_tokens is None
    assert chosen.sources.distilled_tokens == hashlib.sha256(tokens(1).astype("<i4").tobytes()).hexdigest()


def test_processes_change_nothing_of_a_distilled_file(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Nor do scales that moved: it has those of the choice."""
    settings: dict[str, Any] = {"budget_bytes": 12_000, "distillation": 12, "moves_scales": True}
    one = choose_in(folder, calibration, tmp_path / "one.gguf", **settings)
    two = choose_in(folder, calibration, tmp_path / "two.gguf", workers=2, **settings)
    assert one.sources.result == two.sources.result
    assert one.divergences == two.divergences
    assert one.delta_bytes == delta_bytes(folder / "installed.gguf", tmp_path / "one.gguf")
    assert one.changed == _changed(folder / "installed.gguf", tmp_path / "one.gguf")


def _changed(installed: Path, out: Path) -> dict[str, int]:
    with opened_gguf(installed) as old, opened_gguf(out) as new:
        names = [name for name, region in old.tensors.items() if region.layout in LINEAR_LAYOUTS]
        return {name: changed_codes(new, old, name) for name in names}


def test_a_choice_that_distillation_does_not_better_stays_as_it_was(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    plain = choose_in(folder, calibration, tmp_path / "plain.gguf", budget_bytes=2_000)
    chosen = choose_in(folder, calibration, tmp_path / "out.gguf", budget_bytes=2_000, distillation=2)
    before, after = chosen.divergences
    assert after >= before
    assert chosen.sources.result == plain.sources.result
    assert (chosen.changed, chosen.delta_bytes) == (plain.changed, plain.delta_bytes)


def test_distillation_begins_with_the_nearest_codes_where_they_are_better(
    folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    """Without what is known of the layers, a choice is the poorer one."""
    lines: list[str] = []
    blind = choose_in(folder, calibration, tmp_path / "out.gguf", budget_bytes=12_000, metric="weights")
    assert blind.delta_bytes <= 12_000
    chosen = choose(
        folder / "new.gguf",
        folder / "installed.gguf",
        calibration,
        Settings(budget_bytes=4_000, metric="weights", distillation=1, workers=1),
        tmp_path / "out.gguf",
        lines.append,
    )
    assert any("the nearest codes take" in line for line in lines)
    with opened_gguf(folder / "new.gguf") as new, opened_gguf(folder / "installed.gguf") as installed:
        write_nearest(new, installed, tmp_path / "out.gguf", tmp_path / "nearest.gguf")
    nearest = measure_divergence(
        folder / "new.gguf",
        tmp_path / "nearest.gguf",
        calibration,
        tmp_path / "look",
        quiet,
        workers=1,
    )
    assert chosen.divergences[0] <= nearest


def test_what_cannot_be_distilled_is_refused(folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(RequestError, match="up to 2000 steps, not 2001"):
        choose_in(folder, calibration, out, price=1e-8, distillation=2_001)
    with pytest.raises(RequestError, match="runs of 160 tokens, the calibration text has 100"):
        choose_in(
            folder,
            replace(calibration, text=calibration.text[:100]),
            out,
            price=1e-8,
            distillation=1,
        )
    with pytest.raises(RequestError, match="not distilled where devices have several"):
        choose(
            folder / "new.gguf",
            folder / "installed.gguf",
            calibration,
            Settings(budget_bytes=2_000, distillation=1, workers=1),
            out,
            quiet,
            also=[Portion(quantized(folder / "new.gguf", tmp_path / "other.gguf"), 0.3)],
        )
    assert not out.exists()
