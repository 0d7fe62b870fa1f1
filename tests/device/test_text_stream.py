"""Text that comes token by token, and where it ends."""

import pytest

from device.adapters.text_stream import TextStream


def said(stop: list[str], tokens: list[bytes]) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.feed(token))
        if stream.is_stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.is_stopped


def test_text_is_said_at_once_where_nothing_stops_it() -> None:
    assert said([], [b"Hel", b"lo"]) == (["Hel", "lo", ""], False)


def test_half_a_character_waits_for_its_other_half() -> None:
    assert said([], [b"caf\xc3", b"\xa9"]) == (["caf", "é", ""], False)
    assert said([], [b"caf\xc3"]) == (["caf", "\ufffd"], False)


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        (["\n"], [b"one", b"\ntwo"], "one"),
        (["###"], [b"a#", b"#", b"# b"], "a"),
        (["END"], [b"the EN", b"DING"], "the "),
        (["b", "ab"], [b"xa", b"b"], "x"),
        (["stop"], [b"stop"], ""),
    ],
)
def test_a_stop_word_ends_the_text_also_over_several_tokens(
    stop: list[str], tokens: list[bytes], text: str
) -> None:
    pieces, is_stopped = said(stop, tokens)
    assert ("".join(pieces), is_stopped) == (text, True)


def test_what_only_looked_like_a_stop_word_is_said_after_all() -> None:
    assert said(["###"], [b"a##", b"b"]) == (["a", "##b", ""], False)
    assert said(["###"], [b"a##"]) == (["a", "##"], False)
