"""No worse than plain has to be shown; not to be caught is not enough."""

import pytest

from protocol.errors import RequestError
from server.requantize.guards import Margins, check_suite, check_texts, is_passed, reasons
from server.scorecard.items import ChoiceQuestion, GoldenQuestion, Item, Reply, Suite, items_digest
from tests.server.requantize.readings import reading

NAMES = ("sources", "manuals")
PLAIN = {name: reading(1, 2.7, 0.2, 0.25) for name in NAMES}


def chosen(kl: float, flips: float, noise: float = 0.05) -> dict[str, object]:
    return {**PLAIN, "manuals": reading(2, 2.7, kl, flips, noise)}


def outcomes(kl: float, flips: float, noise: float = 0.05) -> dict[str, str]:
    checks = check_texts(chosen(kl, flips, noise), PLAIN, NAMES, Margins())  # type: ignore[arg-type]  # readings
    return {check.name: check.status for check in checks}


def test_a_file_that_is_nearer_to_the_float_model_passes() -> None:
    assert set(outcomes(0.15, 0.2).values()) == {"passed"}
    assert set(outcomes(0.2, 0.25).values()) == {"passed"}


def test_a_file_that_is_farther_on_one_text_fails_and_says_by_how_much() -> None:
    assert outcomes(0.25, 0.25)["manuals: divergence"] == "failed"
    assert outcomes(0.15, 0.3)["manuals: flips"] == "failed"
    checks = check_texts(chosen(0.25, 0.25), PLAIN, NAMES, Margins())  # type: ignore[arg-type]
    assert not is_passed(checks)
    (reason,) = reasons(checks)
    assert reason.startswith("manuals: divergence failed: +0.05")
    assert "against plain, allowed are +0.004" in reason


def test_a_file_of_which_too_little_is_known_does_not_pass() -> None:
    found = outcomes(0.199, 0.25, noise=1.5)
    assert found["manuals: divergence"] == "undecided"
    assert not is_passed(check_texts(chosen(0.199, 0.25, 1.5), PLAIN, NAMES, Margins()))  # type: ignore[arg-type]


def test_one_text_is_not_enough() -> None:
    with pytest.raises(RequestError, match="the guards have 1 texts, 2 are needed"):
        check_texts(PLAIN, PLAIN, NAMES[:1], Margins())


def golden(count: int) -> Suite:
    items = tuple(
        Item(
            name=f"prompt {number}",
            question=GoldenQuestion(prompt="p", completion=" yes", tokens_max=4),
            right=" yes",
            is_exact=True,
        )
        for number in range(count)
    )
    return Suite(name="golden", kind="golden", digest=items_digest(items), total=count, items=items)


def said(*texts: str) -> list[Reply]:
    return [Reply(scores=(-0.1,), text=text) for text in texts]


def test_a_prompt_that_plain_answers_has_to_be_answered_by_the_chosen_file_too() -> None:
    suite = golden(3)
    lost = check_suite(suite, said(" yes", " yes", "no"), said(" yes", "no", "no"), Margins())
    assert lost.status == "failed"
    assert lost.detail == "1 of the 2 prompts that plain answers as it has to; not prompt 1"
    kept = check_suite(suite, said(" yes", "no", "no"), said(" yes", " yes", "no"), Margins())
    assert kept.status == "passed"


@pytest.mark.parametrize(
    ("count", "lost", "gained", "status"),
    [(400, 2, 2, "passed"), (400, 60, 5, "failed"), (40, 2, 2, "undecided"), (10, 0, 0, "undecided")],
)
def test_a_suite_may_lose_few_answers_and_has_to_be_large_enough_to_show_it(
    count: int, lost: int, gained: int, status: str
) -> None:
    items = tuple(
        Item(name=str(number), question=ChoiceQuestion(text="q", options=("a", "b")), right="A")
        for number in range(count)
    )
    suite = Suite(name="mmlu", kind="mmlu", digest=items_digest(items), total=count, items=items)
    right, wrong = Reply(scores=(-1.0, -2.0)), Reply(scores=(-2.0, -1.0))
    plain = [right] * lost + [wrong] * gained + [right] * (count - lost - gained)
    now = [wrong] * lost + [right] * gained + [right] * (count - lost - gained)
    check = check_suite(suite, plain, now, Margins())
    assert check.status == status
    assert "against plain" in check.detail
