"""Which images are tried, by whom, and what was found: the moments of all updates share the work, in as many processes as there are cores."""

import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from tests.crash_points.disk import Choices, CrashDisk, Image, identity
from tests.crash_points.machine import Machine, Noted, Start, World, finish, first_life, gone_back, start
from tests.crash_points.updates import UPDATES

VIOLATIONS_MAX: Final = 20
"""More of them are counted and not told."""

DRAWN_IN_PLACE: Final = 1 / 32
SECOND_IN_PLACE: Final = 1 / 8
"""A start that has to apply or to take back a delta takes ten times as long: such updates get this part of the images that are
drawn, and of those of a second power cut."""

ROUNDS_MAX: Final = 50


class Place(NamedTuple):
    """A power cut: after which call, with which image; and perhaps a second one while the device recovers from it."""

    update: str
    moment: int
    number: int
    later_moment: int = -1
    later_number: int = -1

    def __str__(self) -> str:
        parts = [self.update, str(self.moment), str(self.number)]
        if self.later_moment >= 0:
            parts += [str(self.later_moment), str(self.later_number)]
        return "/".join(parts)

    @classmethod
    def parse(cls, text: str) -> "Place":
        """Read what `str` gives.

        Raises:
            ValueError: It is none.
        """
        update, *numbers = text.split("/")
        if update not in UPDATES or len(numbers) not in {2, 4}:
            raise ValueError(f"{text} is not UPDATE/MOMENT/NUMBER or UPDATE/MOMENT/NUMBER/MOMENT/NUMBER")
        return cls(update, *map(int, numbers))


@dataclass
class Tally:
    """What was tried and found."""

    images: int = 0
    second_images: int = 0  # of power cuts during a recovery
    recoveries: int = 0  # that were cut
    starts: int = 0  # carried out; an image that was there before starts as it did then
    finished: int = 0  # updates brought to their end after a start
    seen: set[int] = field(default_factory=set)
    second_seen: set[int] = field(default_factory=set)
    updates: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    exhausted: int = 0  # moments of which every image was tried
    violation_count: int = 0
    violations: list[tuple[Place, str, str]] = field(default_factory=list)  # where, after which call, what

    def add(self, other: "Tally") -> None:
        """Take over what another one counted."""
        for name in (
            "images",
            "second_images",
            "recoveries",
            "starts",
            "finished",
            "exhausted",
            "violation_count",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seen |= other.seen
        self.second_seen |= other.second_seen
        self.updates += other.updates
        self.states += other.states
        self.calls += other.calls
        self.violations = [*self.violations, *other.violations][:VIOLATIONS_MAX]


class Course:
    """One update: its moments, and what is known of the starts from their images.

    Args:
        name: The update.
        seed: Decides the images that are drawn.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.world = World(UPDATES[name])
        self.moments = first_life(self.world)
        self.choices = [Choices(each.moment, f"{seed}/{name}/{at}") for at, each in enumerate(self.moments)]
        self._seed = seed
        self._starts: dict[int, Start] = {}
        self._alike: dict[Start, Start] = {}
        self._finished: set[tuple[int, str]] = set()

    def examine(
        self, place: Place, image: Image, noted: Noted, tally: Tally, *, always: bool = False
    ) -> None:
        """Start from an image, once, and see what the device makes of it."""
        key = identity(image)
        (tally.seen if place.later_moment < 0 else tally.second_seen).add(key)
        tally.updates[self.name] += 1
        tally.states[noted.state.value] += 1
        tally.calls[noted.call.partition(" ")[0]] += 1
        known, machine = self._starts.get(key), None
        if known is None or always:
            tally.starts += 1
            known, machine = start(self.world, image, noted)
            self._starts[key] = known = self._alike.setdefault(known, known)
        wrong = [known.wrong or gone_back(known, noted.acknowledged)]
        if machine is not None and (always or (known.shape, noted.ends) not in self._finished):
            self._finished.add((known.shape, noted.ends))
            tally.finished += 1
            wrong += finish(machine, image)
        for each in filter(None, wrong):
            tally.violation_count += 1
            if len(tally.violations) < VIOLATIONS_MAX:
                tally.violations.append((place, f"{noted.call}, {noted.state.value}", each))

    def try_moment(self, at: int, numbers: Iterable[int], tally: Tally) -> None:
        """The images of one moment."""
        noted, choices = self.moments[at], self.choices[at]
        for number in numbers:
            tally.images += 1
            self.examine(Place(self.name, at, number), choices.image(number), noted, tally)

    def recovery(self, at: int, number: int) -> tuple[list[Noted], str]:
        """Every moment of the start from an image, until there is nothing to do without a network; and what went wrong."""
        noted = self.moments[at]
        moments: list[Noted] = []
        try:
            machine = Machine(self.world, CrashDisk(self.choices[at].image(number)), noted)
            moments = machine.moments
            machine.watch()
            machine.settle()
        except Exception as error:  # noqa: BLE001 - whatever it is, the device does not recover
            return moments, f"does not recover: {error!r}"
        return moments, ""

    def later_choices(self, place: Place, noted: Noted) -> Choices:
        """What a second power cut may leave."""
        return Choices(
            noted.moment, f"{self._seed}/{self.name}/{place.moment}/{place.number}/{place.later_moment}"
        )

    def try_recovery(self, at: int, number: int, count: int, tally: Tally) -> None:
        """Cut the power again, at every moment of the recovery from an image."""
        tally.recoveries += 1
        moments, wrong = self.recovery(at, number)
        if wrong:
            tally.violation_count += 1
            tally.violations.append((Place(self.name, at, number), self.moments[at].call, wrong))
        ats = list(range(len(moments)))
        if count < len(moments):
            ats = sorted(random.Random(f"{self._seed}/{self.name}/{at}/{number}").sample(ats, count))
        places = [Place(self.name, at, number, later, 0) for later in ats]
        choices = [self.later_choices(place, moments[place.later_moment]) for place in places]
        for place, each, share in zip(
            places, choices, shares([c.count for c in choices], count), strict=True
        ):
            noted = moments[place.later_moment]
            for later in drawn(each, share, f"{self._seed}/{place}"):
                tally.second_images += 1
                self.examine(place._replace(later_number=later), each.image(later), noted, tally)


def shares(sizes: list[int], count: int, weights: list[float] | None = None) -> list[int]:
    """`count` dealt out so that everybody gets alike, but nobody more than there is: the rest goes to the others."""
    weights = weights or [1.0] * len(sizes)
    low, high = 0.0, float(max(count, 1))
    while high - low > 0.5:
        middle = (low + high) / 2
        if sum(min(size, int(middle * weight)) for size, weight in zip(sizes, weights, strict=True)) < count:
            low = middle
        else:
            high = middle
    return [min(size, int(high * weight)) for size, weight in zip(sizes, weights, strict=True)]


def drawn(choices: Choices, count: int, key: str) -> Iterable[int]:
    """Numbers of `count` images: the first ones where images are drawn by number anyway, and any where they are listed."""
    if not choices.is_exhaustive or count >= choices.count:
        return range(count)
    return random.Random(key).sample(range(choices.count), count)


class Job(NamedTuple):
    """A piece of work: images of one moment, or second power cuts after one of them."""

    course: str
    moment: int
    images: int
    number: int = -1


def _weight(course: Course, in_place: float) -> float:
    return in_place if course.world.update.is_in_place else 1.0


class Campaign:
    """All updates.

    Args:
        seed: Decides the images that are drawn.
        names: The updates; all of them where none is named.
    """

    def __init__(self, seed: int, names: Iterable[str] = ()) -> None:
        self.seed = seed
        self.courses = {name: Course(name, seed) for name in names or UPDATES}

    def first_jobs(self, count: int) -> list[Job]:
        """`count` images over all moments; every one of a moment that has no more than others get."""
        places = self._places()
        sizes = [course.choices[at].count for course, at in places]
        weights = [
            1.0 if course.choices[at].is_exhaustive else _weight(course, DRAWN_IN_PLACE)
            for course, at in places
        ]
        dealt = shares(sizes, count, weights)
        return [
            Job(course.name, at, share) for (course, at), share in zip(places, dealt, strict=True) if share
        ]

    def second_jobs(self, count: int) -> list[Job]:
        """One recovery after each moment, from one of its images."""
        places, rng = self._places(), random.Random(f"{self.seed}/recoveries/{count}")
        if count < len(places):
            places = [places[at] for at in sorted(rng.sample(range(len(places)), max(1, count // 20)))]
        weights = [_weight(course, SECOND_IN_PLACE) for course, _ in places]
        dealt = shares([count] * len(places), count, weights)
        return [
            Job(course.name, at, max(1, share), rng.randrange(course.choices[at].count))
            for (course, at), share in zip(places, dealt, strict=True)
        ]

    def _places(self) -> list[tuple[Course, int]]:
        return [(course, at) for course in self.courses.values() for at in range(len(course.moments))]

    def carry_out(self, job: Job) -> Tally:
        """Do one piece of work."""
        tally, course = Tally(), self.courses[job.course]
        if job.number >= 0:
            course.try_recovery(job.moment, job.number, job.images, tally)
            return tally
        choices = course.choices[job.moment]
        numbers = drawn(choices, job.images, f"{self.seed}/{job.course}/{job.moment}")
        course.try_moment(job.moment, numbers, tally)
        tally.exhausted += choices.is_exhaustive and job.images >= choices.count
        return tally

    def run(
        self, count: int, second_count: int, workers: int, show: Callable[[Tally], None] = lambda _: None
    ) -> Tally:
        """Try `count` images, and `second_count` of a second power cut."""
        total = Tally()
        for tally in self._results(self.first_jobs(count), workers):
            total.add(tally)
            show(total)
        for _ in range(ROUNDS_MAX):
            missing = second_count - total.second_images
            if missing <= 0:
                break
            for tally in self._results(self.second_jobs(missing), workers):
                total.add(tally)
                show(total)
        return total

    def _results(self, jobs: list[Job], workers: int) -> Iterator[Tally]:
        if workers <= 1:
            yield from map(self.carry_out, jobs)
            return
        global _campaign  # noqa: PLW0603 - what a forked process finds
        _campaign = self
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            yield from pool.imap_unordered(_carry_out, jobs, chunksize=4)

    def replay(self, place: Place) -> Tally:
        """One power cut, or two, and everything up to the end of the update."""
        tally, course = Tally(), self.courses[place.update]
        if place.later_moment < 0:
            noted, choices, number = course.moments[place.moment], course.choices[place.moment], place.number
        else:
            moments, _ = course.recovery(place.moment, place.number)
            noted, number = moments[place.later_moment], place.later_number
            choices = course.later_choices(place, noted)
        course.examine(place, choices.image(number), noted, tally, always=True)
        return tally


_campaign: Campaign | None = None


def _carry_out(job: Job) -> Tally:
    assert _campaign is not None
    return _campaign.carry_out(job)


__all__ = ["Campaign", "Place", "Tally"]
