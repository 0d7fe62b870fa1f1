"""Text that calibration has seen is not used to judge."""

import numpy as np
import pytest

from protocol.errors import RequestError
from server.requantize.texts import RUN_TOKENS, RUNS, WINDOW_TOKENS, Text, check_unseen, window_hashes


def drawn(name: str, seed: int, count: int = 4000) -> Text:
    return Text(name, np.random.default_rng(seed).integers(0, 300, count).astype(np.int32))


def with_part_of(text: Text, other: Text, length: int, at: int) -> Text:
    tokens = text.tokens.copy()
    tokens[at : at + length] = other.tokens[777 : 777 + length]
    return Text(text.name, tokens)


@pytest.mark.parametrize("at", [0, 1234, 4000 - WINDOW_TOKENS])
def test_a_text_that_shares_a_window_with_calibration_is_refused_with_the_place(at: int) -> None:
    seen = drawn("calibration", 1)
    with pytest.raises(
        RequestError, match=f"held out has 64 tokens in a row, from token {at} on, that calibration has"
    ):
        check_unseen([with_part_of(drawn("held out", 2), seen, WINDOW_TOKENS, at)], [seen])


def test_a_phrase_in_common_is_none_of_that() -> None:
    seen = drawn("calibration", 1)
    check_unseen(
        [with_part_of(drawn("held out", 2), seen, WINDOW_TOKENS - 1, 100)], [seen, drawn("short", 3, 20)]
    )


def test_texts_that_judge_share_nothing_with_each_other_either() -> None:
    one = drawn("one", 1)
    with pytest.raises(RequestError, match="two has 64 tokens"):
        check_unseen([one, with_part_of(drawn("two", 2), one, WINDOW_TOKENS, 5)], [])


def test_windows_with_equal_sums_are_told_apart() -> None:
    tokens = np.zeros(2 * WINDOW_TOKENS, np.int32)
    tokens[3] = 1
    hashes = window_hashes(tokens)
    assert (
        len(set(hashes[:5].tolist())) == 5
    )  # the one token stands elsewhere in each, and is missing in the last
    assert len(set(hashes[4:].tolist())) == 1


def test_runs_do_not_overlap_and_reach_from_end_to_end() -> None:
    text = Text("long", np.arange(10_000, dtype=np.int32))
    runs = text.runs()
    assert runs.shape == (RUNS, RUN_TOKENS)
    assert runs[0, 0] == 0
    assert runs[-1, -1] == 9_999
    assert (np.diff(runs[:, 0]) >= RUN_TOKENS).all()


def test_as_many_runs_are_read_as_are_asked_for_and_there() -> None:
    tokens = np.arange(10_000, dtype=np.int32)
    assert len(Text("long", tokens, runs_max=12).runs()) == 12
    assert len(Text("long", tokens, runs_max=64).runs()) == Text("long", tokens).runs_there == 19
    assert Text("long", tokens, runs_max=12).digest != Text("long", tokens).digest


def test_a_text_that_is_too_short_to_judge_on_is_refused() -> None:
    with pytest.raises(RequestError, match="short has 1023 tokens, 1024 are needed"):
        drawn("short", 1, 1023).runs()
