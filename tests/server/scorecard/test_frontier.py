"""The frontier of a requantized file: which points nothing beats, which one a rule chooses, and what a damaged record says."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET
from msgspec.structs import replace

from protocol.errors import ReleaseError, RequestError
from server import operations
from server.cli import main
from server.documents import read_card
from server.home import opened
from server.scorecard.card import Scorecard, decode_card, encode_card
from server.scorecard.frontier import (
    POINTS_MAX,
    Frontier,
    Rule,
    decode_frontier,
    encode_frontier,
    pick,
    standings,
)
from server.scorecard.frontier_display import choice_text, point_rows, text_lines
from server.scorecard.frontier_plot import Dot, plot
from server.scorecard.keeping import Plan
from server.scorecard.page import render
from server.scorecard.statistics import Interval
from server.scorecard.suites import Asking
from server.scorecard.verdict import Limits
from server.scorecard.work import MemoryOrder, SpeedOrder
from server.scoring import score_release
from tests.models import write_classifier, write_health_plan
from tests.server.frontiers import RULE, make_frontier, point_of, written
from tests.server.requantize.readings import COUNT

CONTROLS = {"nothing sent", "plain", "plain, embedding frozen"}


@pytest.fixture(scope="module")
def frontier(tmp_path_factory: pytest.TempPathFactory) -> Frontier:
    return make_frontier(tmp_path_factory.mktemp("frontier"))


def test_a_point_is_beaten_by_what_weighs_no_more_and_is_surely_no_worse(frontier: Frontier) -> None:
    found = standings(frontier)
    assert {name: standing.mark for name, standing in found.items()} == {
        "nothing sent": "best",  # nothing weighs as little
        "plain": "beaten",
        "plain, embedding frozen": "beaten",
        "0.1%": "best",
        "0.5%": "best",
        "1%": "best",
    }
    assert found["plain"].surely == ("0.5%", "1%")
    assert found["plain, embedding frozen"].surely == ("0.5%",)


def test_what_the_text_does_not_decide_beats_nothing_for_certain(frontier: Frontier) -> None:
    less = frontier.difference(frontier.point("1%"), frontier.point("0.5%"))
    unsure = replace(
        less, kl=Interval(value=-0.01, low=-0.05, high=0.03), flips=replace(less.flips, low=-0.1, high=0.1)
    )
    others = [each for each in frontier.point("1%").differences if each.other != "0.5%"]
    found = standings(point_of(frontier, "1%", differences=(*others, unsure)))["1%"]
    assert (found.surely, found.perhaps, found.mark) == ((), ("0.5%",), "best?")


def test_differences_are_the_same_from_either_side(frontier: Frontier) -> None:
    one, other = frontier.point("plain"), frontier.point("1%")
    there, back = frontier.difference(one, other), frontier.difference(other, one)
    assert there.kl.value == pytest.approx(one.kl.value - other.kl.value)
    assert (there.kl.low, there.kl.high) == (-back.kl.high, -back.kl.low)


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        (RULE, "0.5%"),  # 0.1% is worse than plain
        (replace(RULE, kind="keep", keep_share=0.5), "0.5%"),  # 0.1% keeps 60 %, and is farther than plain
        (replace(RULE, kind="keep", keep_share=1.15), "1%"),
        (replace(RULE, kind="keep", keep_share=1.5), ""),
        (replace(RULE, kind="budget", budget="0.1%"), "0.1%"),
        (replace(RULE, kind="budget", budget="2%"), ""),
    ],
)
def test_a_rule_chooses_the_fewest_bytes_that_are_enough(frontier: Frontier, rule: Rule, chosen: str) -> None:
    found = pick(replace(frontier, rule=rule))
    assert ("" if found is None else found.name) == chosen
    words = choice_text(replace(frontier, rule=rule, chosen=chosen))
    assert words.startswith(chosen or "none; wanted were ")


def test_what_was_written_is_read_back(frontier: Frontier) -> None:
    found = written(frontier, b"file")
    data = encode_frontier(found)
    assert decode_frontier(data, "there") == found
    assert frontier.tokens == COUNT
    assert json.loads(data)["frontier"] == 1


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        value = json.loads(data)
        change(value)
        return json.dumps(value).encode()

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-40], "is no frontier: Input data was truncated"),
        (lambda _: b"[" * 100_000, "is no frontier"),
        (lambda _: b"\xff\xfe", "is no frontier"),
        (lambda data: data + b" " * (1 << 20), r"has \d+ bytes, allowed are 1048576"),
        (damaged(lambda found: found.update(frontier=2)), r"Invalid enum value 2 - at `\$.frontier`"),
        (damaged(lambda found: found.update(installed="../etc")), r"at `\$.installed`"),
        (damaged(lambda found: found.update(chosen="2%")), "the chosen point 2% is not there"),
        (damaged(lambda found: found.update(chosen="")), "a file was written, and no point was chosen"),
        (damaged(lambda found: found["points"].pop(1)), "there is no point plain"),
        (
            damaged(lambda found: found["points"].pop(0)),
            "differences are not those from the 0 points before it",
        ),
        (damaged(lambda found: found["points"][5].update(name="0.5%")), "two points are called 0.5%"),
        (
            damaged(lambda found: found["points"][2]["kl"].update(low=1.0)),
            "plain, embedding frozen: an interval is none",
        ),
        (
            damaged(lambda found: found["points"][0]["kl"].update(low=-0.1)),
            "nothing sent: a divergence is below 0",
        ),
        (damaged(lambda found: found["points"][0]["flips"].update(high=1.1)), "flips are no share"),
        (
            damaged(lambda found: found["points"][3].update(delta_bytes=-1)),
            r"at `\$.points\[3\].delta_bytes`",
        ),
        (
            damaged(lambda found: found.update(points=found["points"] * POINTS_MAX)),
            r"length <= 20 - at `\$.points`",
        ),
        (damaged(lambda found: found["rule"].update(kind="best")), r"at `\$.rule.kind`"),
        (
            damaged(lambda found: found["held_out"][1]["plain_kl"].update(high=-1)),
            "chats.txt: an interval is none",
        ),
    ],
)
def test_a_damaged_record_is_refused_with_its_name_and_what_is_wrong(
    frontier: Frontier, damage: Callable[[bytes], bytes], words: str
) -> None:
    data = damage(encode_frontier(written(frontier, b"file")))
    with pytest.raises(ReleaseError, match=words) as refused:
        decode_frontier(data, "v2.gguf.frontier.json")
    assert str(refused.value).startswith("v2.gguf.frontier.json ")


def test_people_see_the_points_the_choice_and_how_it_was_judged(frontier: Frontier) -> None:
    rows = point_rows(written(frontier, b"file"))
    assert [row[:4] for row in rows][3:5] == [
        ["best", "0.1%", "1,000", "0.1 %"],
        ["best", "0.5% (chosen)", "5,000", "0.5 %"],
    ]
    text = "\n".join(text_lines(written(frontier, b"file")))
    assert "Bytes against quality, measured on notes.txt, 4,088 tokens" in text
    assert "plain is beaten by 0.5%, 1%" in text
    assert "0.01%: no room" in text
    assert re.search(
        r"^Chosen: 0.5%, the fewest bytes .* by 2 % of plain's and in flips by 0.5 points$",
        text,
        re.MULTILINE,
    )
    assert re.search(r"^manual.txt +4,088 +chosen", text, re.MULTILINE)
    refused = replace(written(frontier, b"file"), result=UNSET)
    assert choice_text(refused).endswith("; not written, as it did not pass on the held-out texts")


def test_a_picture_holds_every_point_and_names_cannot_leave_their_place() -> None:
    near, far = Interval(value=0.1, low=0.09, high=0.11), Interval(value=0.4, low=0.3, high=0.5)
    dots = [
        Dot("nothing", 0, far, "best", is_chosen=False),
        Dot('<script>"x"', 900, near, "beaten", is_chosen=False),
        Dot("0.1%", 9_000, near, "best", is_chosen=False),
        Dot("1%", 90_000, near, "best", is_chosen=True),
    ]
    drawn = plot(dots, "bytes", "a <picture>")
    assert "<script>" not in drawn
    assert 'aria-label="a &lt;picture&gt;"' in drawn
    assert drawn.count('r="6"') == 3
    assert drawn.count('r="10"') == 1
    first, middle, last = (float(x) for x in re.findall(r'cx="([\d.]+)" cy="[\d.]+" r="6"', drawn))
    assert 70 <= first < middle < last <= 530
    assert middle - first == pytest.approx(last - middle, abs=0.2)  # the scale is one of ratios
    assert ">1 kB<" in drawn
    assert ">10 kB<" in drawn
    assert not plot(dots[:2], "bytes", "one point is no frontier")
    assert plot([replaced._replace(bytes=7) for replaced in dots], "bytes", "all alike")


# What `whimbrel score` makes of it.

QUICK = Plan(
    asking=Asking(),
    limits=Limits(),
    threads=1,
    speed=SpeedOrder(inferences=20, loads=1),
    memory=MemoryOrder(),
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server with a draft whose file is said to be chosen from a frontier."""
    folder = tmp_path_factory.mktemp("frontier")
    operations.init_repository(folder / "server", "lab")
    health = write_health_plan(folder / "health.json")
    model = write_classifier(folder / "v1.onnx", 1)
    operations.add_release(folder / "server", "digits", "v1", [model], runtime="onnx", health=health)
    return folder / "server"


def card_of(home: Path) -> Scorecard:
    with opened(home) as there:
        card = read_card(there, operations.show_release(home, "digits", "v1").record.release)
    assert card is not None
    return card


def test_a_scorecard_keeps_the_frontier_of_its_file_and_is_the_same_without_one(home: Path) -> None:
    file = (home.parent / "v1.onnx").read_bytes()
    plain = score_release(home, "digits", "v1", suites=[], plan=QUICK).card
    assert b'"frontier"' not in encode_card(plain)
    frontier = written(make_frontier(home.parent), file)
    scored = score_release(home, "digits", "v1", suites=[], plan=QUICK, frontier=frontier)
    assert scored.is_bound
    assert (card_of(home).frontier, card_of(home).verdict) == (frontier, plain.verdict)
    again = score_release(home, "digits", "v1", suites=[], plan=QUICK).card  # not given again
    assert encode_card(again) == encode_card(scored.card)
    page = render(scored.card, scored.digest)
    assert "How the file was chosen" in page
    assert "0.5% (chosen)" in page
    assert "Divergence from the float model on notes.txt" in page
    assert "How the file was chosen" not in render(plain, "0" * 64)
    broken = msgspec.structs.replace(scored.card, frontier=replace(frontier, chosen="gone"))
    with pytest.raises(
        ReleaseError, match="of how the file was chosen is no frontier: the chosen point gone is not there"
    ):
        decode_card(encode_card(broken), "card.json")


def test_a_frontier_of_another_file_is_refused_before_anything_is_measured(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = written(make_frontier(tmp_path), b"other")
    with pytest.raises(RequestError, match="which digits v1 does not have"):
        score_release(home, "digits", "v1", suites=[], plan=QUICK, frontier=other)
    with pytest.raises(RequestError, match="no file was written from it"):
        score_release(home, "digits", "v1", suites=[], plan=QUICK, frontier=replace(other, result=UNSET))
    path = tmp_path / "cut.json"
    path.write_bytes(encode_frontier(other)[:100])
    order = ["score", "digits", "v1", "--dir", str(home), "--frontier"]
    assert main([*order, str(path)]) == 1
    assert f"{path} is no frontier: Input data was truncated" in capsys.readouterr().err
    assert main([*order, str(tmp_path / "none.json")]) == 1
    assert "none.json: No such file or directory" in capsys.readouterr().err
