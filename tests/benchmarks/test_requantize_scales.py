"""The table of moving scales, from matrices that are made up."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.requantize_scales import Chosen, Part, choose, less_lost, lines, write
from protocol.tensors import Layout
from server.requantize.codes import CodedRows
from server.requantize.descent import Metric


def _parts() -> list[Part]:
    rng = np.random.default_rng(1)
    found = []
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight"):
        weights = rng.normal(0.0, 0.05, (16, 64)).astype(np.float32)
        data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_0)
        seen = rng.normal(0.0, 1.0, (256, 64)) @ rng.normal(0.0, 1.0, (64, 64))
        metric = Metric(
            (seen.T @ seen / 256).astype(np.float32), np.ones(16, np.float32), np.zeros(16, np.float32)
        )
        found.append(Part(name, CodedRows.read(Layout.Q4_0, data.tobytes(), 64), weights, metric))
    return found


def test_a_row_has_what_moved_what_it_weighs_and_what_is_lost(tmp_path: Path) -> None:
    parts, base = _parts(), tmp_path / "base.gguf"
    write(base, parts, [each.rows.joined(each.rows.codes) for each in parts])
    still, moving = (
        choose(parts, 1e-6, base, tmp_path / "new.gguf", moves_scales=each) for each in (False, True)
    )
    assert still.scales == 0 < still.codes
    assert moving.scales > 0
    assert moving.after < still.after
    assert moving.bytes > 0
    table = lines(parts, (1e-6,), tmp_path)
    assert "2,048 weights" in table[0]
    assert f"{still.codes:,}" in table[2].split()
    assert f"{moving.scales:,}" in table[3].split()
    assert "times the processor time of codes alone" in table[4]


def test_rows_are_compared_at_the_same_bytes() -> None:
    still = [
        Chosen(after=8.0, codes=1, scales=0, bytes=100, cpu_s=1.0),
        Chosen(after=4.0, codes=9, scales=0, bytes=400, cpu_s=1.0),
    ]
    assert less_lost(Chosen(after=5.4, codes=3, scales=3, bytes=200, cpu_s=3.0), still) == pytest.approx(0.1)
    assert less_lost(Chosen(after=3.0, codes=3, scales=3, bytes=401, cpu_s=3.0), still) is None
