"""What the coding of one run goes by: the parameters of the run taken apart, and where in its tensor it is."""

from dataclasses import dataclass, field
from typing import Final, Self

from protocol.delta.reference.arithmetic import STEP
from protocol.delta.reference.blocks import Shape, shape_of
from protocol.delta.reference.coder import Coder
from protocol.delta.reference.rank import Directions
from protocol.delta.reference.state import MODELS, Model, State, Tensor
from protocol.delta.runs import COLUMNS_MAX, ContextRun, Flag

GROUP_MAX: Final = 32


@dataclass(slots=True)
class Context:
    """One run.

    Attributes:
        coder: Of the segment.
        state: Of the segment.
        tensor: Of the state.
        model: Of the run's slot.
        shape: Of the run's layout.
        row_codes: Codes in a row.
        columns: How many have entries of their own.
        in_row: Of the next code.
        gain: What plain codes are expected to be multiplied by, units of 2**-16.
        offset: And what is added.
        is_sparse: A flag tells of most groups that they are as expected.
        has_drift: Columns move together.
        has_lattice: Scales came from bfloat16 maxima.
        has_scales: Words are the scales of columns, or those are the scales of these codes' columns.
        has_grid: Weights came from bfloat16.
        directions: In which rows move, where there is a basis.
    """

    coder: Coder
    state: State
    tensor: Tensor
    model: Model
    shape: Shape
    row_codes: int
    columns: int
    in_row: int
    gain: int
    offset: int
    is_sparse: bool
    has_drift: bool
    has_lattice: bool
    has_scales: bool
    has_grid: bool
    directions: Directions | None

    @classmethod
    def of(cls, run: ContextRun, coder: Coder, state: State) -> Self:
        """Return what a checked run starts with."""
        shape = shape_of(run.layout)
        gain, offset = run.gain or (STEP, 0)
        return cls(
            coder,
            state,
            state.tensor,
            MODELS[run.slot],
            shape,
            run.row_codes,
            min(run.row_codes, COLUMNS_MAX),
            run.first_block * shape.count % run.row_codes,
            gain,
            offset,
            Flag.SPARSE in run.flags,
            Flag.DRIFT in run.flags,
            Flag.LATTICE in run.flags and shape.divisor > 0,
            Flag.SCALES in run.flags and shape.divisor == 0,
            Flag.GRID in run.flags,
            Directions(run.basis) if run.basis else None,
        )

    @property
    def is_moving(self) -> bool:
        """Whether rows or columns are expected to have moved."""
        return self.has_drift or self.directions is not None


@dataclass(slots=True)
class Group:
    """Codes that share a step. They are centred: 0 stands for the weight 0.

    Attributes:
        low: The lowest code.
        high: The highest.
        old_step: Between weights of neighbouring codes, in the base.
        new_step: In the result.
        old_offset: What is added to weights, in the base.
        new_offset: In the result.
        column: Of the first code.
        old: Codes of the base.
        wanted: Codes of the result; empty for a reader.
        ratio: From old codes to new ones, units of 2**-16.
        shift: Likewise.
        ratios: Of each code's column, where they differ; else empty.
        level: log2 of the row's b in steps, without the columns' part.
        mean: By how much columns and rows are expected to have moved, units of 2**-16 steps; empty for not at all.
        expected: Codes.
        side: 1 where the next likely code is above.
        place: Offset class and spread class.
        grid: Candidates, chance class and lean class, where the grid says more than the place.
    """

    low: int
    high: int
    old_step: int = STEP
    new_step: int = STEP
    old_offset: int = 0
    new_offset: int = 0
    column: int = 0
    old: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    ratio: int = STEP
    shift: int = 0
    ratios: list[int] = field(default_factory=list)
    level: int = 0
    mean: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    side: list[int] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    grid: list[tuple[int, int, int] | None] = field(default_factory=list)
