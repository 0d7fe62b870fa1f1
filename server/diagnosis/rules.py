"""From how tensors changed to named findings. Pure; every threshold is a constant with its reason.

The idea that tells a bad quantization from other weights: rounding to a grid of step s moves a weight by s / sqrt(12) on average.
A change that is no larger than what the grids of both versions explain is a quantization, however coarse; one that is larger comes
from other weights. And what tells training from noise: training moves a matrix in a few directions, noise in all of them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from statistics import median
from typing import Final

from protocol.delta.layouts import LAYOUTS
from server.diagnosis.comparison import TensorChange
from server.diagnosis.findings import Finding, finding
from server.diagnosis.weights import FLOATS, WORDS

ROUNDING_MAX: Final = 2.0
"""Mean square change over what rounding explains. Requantizing one set of weights gives 0.004 (from four bits to eight) to 0.8
(from four to three); a factor of two leaves room for quantizers that search for scales."""

COARSE_STEP: Final = 1.3
"""A grid is coarser with steps this much longer: one bit less makes them twice as long."""

COARSE_VALUES: Final = 2 / 3
"""Different values that a block has left of those before, in the same layout. Other weights have as many, up to a few percent."""

COARSE_RELATIVE: Final = 0.13
"""Change that a quantization may cost. Types of four bits cost 0.08 to 0.11, of three bits 0.15 and more."""

NOISE_RELATIVE: Final = 0.05
"""Smaller noise than the rounding of four bits does not show in answers."""

NOISE_DIRECTIONS: Final = 0.4
"""Directions of a change as a share of those of noise, in the median matrix of a layer. Noise of any size has 0.7 to 1.3; updates of
rank 8 to 64 have less than 0.2 where rounding does not hide them."""

NOISE_ROUNDING: Final = 1.2
"""Mean square change over what rounding explains, where nothing was quantized otherwise: below, rounding hides in which directions
a change goes."""

NOISE_CONTRAST: Final = 4.0
"""A layer stands out if it changed by this much more than the median of all layers."""

UNRELATED_COSINE: Final = 0.3
"""Weights of two models that were not made from each other have a cosine of 0.0; those of a fine-tune have more than 0.9."""

FAR_RELATIVE: Final = 0.2
"""Low-rank and full fine-tunes move weights by 0.001 to 0.1; beyond 0.2 what was learned before is being lost."""

GAIN_TOLERANCE: Final = 0.1
"""Coarse quantizations shrink weights by up to 7 %."""

GAIN_COSINE: Final = 0.97
"""Of a tensor that was multiplied by a factor, and is the same otherwise."""

PERMUTED_SHARE: Final = 0.01
"""Of the codes at other places: two that have changed places by chance in a small update mean nothing."""

PERMUTED_ORDER: Final = 0.1
"""Change of the sorted weights of blocks over that of the weights as they stand: two blocks that have nothing to do with each other
have 0.2 and more."""

PERMUTED_RELATIVE: Final = 0.5
"""Weights that have changed places have moved by as much as they are large; half of it leaves room for those that stayed."""

SHIFTED_SCALES: Final = 0.9
"""Share of kept scales, of a quantizer that did the same to other weights."""

SHIFTED_ROUNDING: Final = 0.25
"""Mean square change over what rounding explains: fine-tunes of four bits have 0.001 to 0.1; quantizers that round otherwise on the same
scales have 1 and more. Types of more than five bits are not rounded in more than one way."""

SHIFTED_BITS: Final = 5

UNITS_FACTOR: Final = 8.0
"""By which biases of integers grow or shrink when the inputs that a model was calibrated on have another range. Training them further
makes a factor of up to three."""

SATURATED_BLOCKS: Final = 0.1
"""Of a tensor: where blocks have few different values, up to 5 % of them have most at the ends."""

RESIZED_SCALES: Final = 0.5
"""RMS change of a tensor of scales. A fine-tune moves the largest weight of a channel, and with it the scale, by a few percent."""

_LAYER: Final = re.compile(r"(?:^|[._/])(blk|layers?|h|blocks?)[._](\d+)(?:[._]|$)")


def findings_of_tensors(
    changes: Sequence[TensorChange], scale_names: AbstractSet[str] = frozenset()
) -> list[Finding]:
    """What the changes of tensors say.

    Args:
        changes: Of all tensors that both versions have.
        scale_names: Tensors that hold the scales of others.
    """
    changed = [each for each in changes if each.is_compared and not each.is_identical]
    weights = [each for each in changed if each.name not in scale_names]
    units = list(_of_units(weights))
    numbers = [each for each in weights if each.new_layout not in WORDS] or ([] if units else weights)
    found = [
        *_of_blocks(changed),
        *_of_scale_tensors([each for each in changed if each.name in scale_names]),
        *_of_codes(weights),
        *units,
        *_of_change(numbers, changes),
    ]
    opaque = [each.name for each in changes if not each.is_compared]
    if opaque:
        found.append(finding("tensors.opaque", f"{len(opaque)} tensor(s) of other types changed", opaque))
    return found


def _of_blocks(changes: Sequence[TensorChange]) -> Iterator[Finding]:
    kinds: list[tuple[str, str, Callable[[TensorChange], int]]] = [
        ("weights.not_finite", "blocks are not finite", lambda each: each.blocks.not_finite),
        ("scales.zero", "block scales became zero", lambda each: each.blocks.lost_scale),
        ("scales.out_of_range", "blocks have a scale of another size", lambda each: each.blocks.resized),
        (
            "blocks.dead",
            "blocks became one value",
            lambda each: 0 if _has_fewer_values(each) else each.blocks.dead,  # a coarse grid has some
        ),
        (
            "codes.saturated",
            "blocks are saturated",
            lambda each: each.blocks.saturated if _is_saturated(each) else 0,
        ),
        (
            "weights.old_not_finite",
            "blocks of the older version are not finite",
            lambda each: each.blocks.old_not_finite,
        ),
    ]
    for code, what, count in kinds:
        hit = sorted(
            (each for each in changes if count(each)),
            key=lambda each: -count(each) / max(1, each.blocks.count),
        )
        if hit:
            bad, total = (
                sum(number)
                for number in zip(*((count(each), each.blocks.count) for each in hit), strict=True)
            )
            summary = f"{bad} of {total} {what}, in {_spread(hit)}"
            yield finding(code, summary, _names(hit), blocks=bad, blocks_of_tensors=total, tensors=len(hit))


def _of_scale_tensors(changes: Sequence[TensorChange]) -> Iterator[Finding]:
    """Scales in tensors of their own, as ONNX and safetensors have them."""
    hit = [each for each in changes if each.relative >= RESIZED_SCALES and not each.blocks.resized]
    if hit:
        worst = max(hit, key=lambda each: each.relative)
        yield finding(
            "scales.out_of_range",
            f"scales changed by up to {_percent(worst.relative)}, in {_spread(hit)}",
            _names(hit),
            relative=worst.relative,
            tensors=len(hit),
        )


def _of_units(changes: Sequence[TensorChange]) -> Iterator[Finding]:
    """Integer biases stand in units of the scale of a layer's input times that of its weights, and say what became of them."""
    sizes = {
        each.name: each.gain / each.cosine
        for each in changes
        if each.new_layout in WORDS and each.cosine > 0 and each.gain > 0
    }
    hit = [name for name, size in sizes.items() if not 1 / UNITS_FACTOR < size < UNITS_FACTOR]
    if hit:
        ranked = sorted(hit, key=lambda name: -abs(math.log(sizes[name])))
        found = sorted(sizes[name] for name in hit)
        summary = f"integer biases of {len(hit)} layer(s) became {found[0]:.3g} to {found[-1]:.3g} times as large, and so their unit as small"
        yield finding(
            "calibration.changed",
            summary,
            ranked,
            factor_min=found[0],
            factor_max=found[-1],
            tensors=len(hit),
        )


def _of_codes(changes: Sequence[TensorChange]) -> Iterator[Finding]:
    permuted = [each for each in changes if _is_permuted(each)]
    if permuted:
        share = max(each.changed_codes or 0 for each in permuted)
        summary = (
            f"the codes of {_spread(permuted)} are those of before, {_percent(share)} of them at other places"
        )
        yield finding("codes.permuted", summary, _names(permuted), changed_codes=share)
    coarse = [each for each in changes if _has_fewer_values(each)]
    if coarse:
        worst = min(coarse, key=lambda each: each.new_values / each.old_values)
        yield finding(
            "codes.coarse",
            f"a block has {worst.new_values:.1f} different values, and had {worst.old_values:.1f}, in {_spread(coarse)}",
            _names(coarse),
            old_values=worst.old_values,
            new_values=worst.new_values,
            relative=worst.relative,
        )


def _is_permuted(change: TensorChange) -> bool:
    """The same codes at other places; after a fine-tune, nearly the same ones in every block."""
    is_other_order = (
        change.kept_scales is not None
        and change.relative >= PERMUTED_RELATIVE
        and change.reordered <= PERMUTED_ORDER * change.relative
    )
    return is_other_order or (change.is_permuted and (change.changed_codes or 0) >= PERMUTED_SHARE)


def _has_fewer_values(change: TensorChange) -> bool:
    is_same = change.old_layout is change.new_layout
    return is_same and not _is_saturated(change) and change.new_values < COARSE_VALUES * change.old_values


def _is_saturated(change: TensorChange) -> bool:
    return change.blocks.saturated > SATURATED_BLOCKS * change.blocks.count


def _of_change(weights: Sequence[TensorChange], everything: Sequence[TensorChange]) -> Iterator[Finding]:
    """Noise, another model, coarser, scaled, or trained: what no finding about blocks or codes explains, each tensor once."""
    matrices = [each for each in everything if len(each.dims) > 1]
    rest = [
        each
        for each in weights
        if each.relative > 0 and not (_is_permuted(each) or _has_fewer_values(each) or _is_saturated(each))
    ]
    far = [each for each in rest if each.cosine < UNRELATED_COSINE and len(each.dims) > 1]
    if 2 * len(far) > len(matrices):
        cosine = median(each.cosine for each in far)
        summary = f"{len(far)} of {len(matrices)} matrices have a cosine of {cosine:.2f} with those of before"
        yield finding("weights.unrelated", summary, _names(far), cosine=cosine)
        return
    scaled = [each for each in rest if abs(each.gain - 1) > GAIN_TOLERANCE and each.cosine >= GAIN_COSINE]
    scaled = [each for each in scaled if not _is_explained(each)]
    if scaled:
        gains = sorted(each.gain for each in scaled)
        summary = f"{_spread(scaled)} multiplied by {gains[0]:.3g} to {gains[-1]:.3g}"
        yield finding("weights.scaled", summary, _names(scaled), gain_min=gains[0], gain_max=gains[-1])
        rest = [each for each in rest if each not in scaled]
    noisy = _noisy_layers(rest, everything)
    if noisy:
        hit = {each.name for group in noisy.values() for each in group}
        yield _noise(noisy)
        rest = [each for each in rest if each.name not in hit]
    coarse = [each for each in rest if _is_explained(each) and each.step_ratio >= COARSE_STEP]
    coarse = [each for each in coarse if each.relative >= COARSE_RELATIVE]
    if coarse:
        sizes = sorted(each.relative for each in coarse)
        summary = f"{_spread(coarse)} rounded more coarsely, by {_range(sizes)}"
        yield _changed("quantization.coarse", summary, coarse)
    yield from _trained([each for each in rest if each not in coarse], everything)


def _is_explained(change: TensorChange) -> bool:
    return change.rounding <= ROUNDING_MAX


def _noisy_layers(
    moved: Sequence[TensorChange], everything: Sequence[TensorChange]
) -> dict[str, list[TensorChange]]:
    """Layers that stand out by a change without a direction; all of them, where none does and rounding explains nothing."""
    sizes = {name: median(each.relative for each in group) for name, group in _layers(everything).items()}
    usual = median(sizes.values()) if sizes else 0.0
    found: dict[str, list[TensorChange]] = {}
    for name, group in _layers(moved).items():
        matrices = [each for each in group if each.directions is not None and each.relative >= NOISE_RELATIVE]
        if not matrices or median(each.directions or 0 for each in matrices) < NOISE_DIRECTIONS:
            continue
        stands_out = max(each.relative for each in matrices) >= NOISE_CONTRAST * usual
        is_same = all(each.old_layout is each.new_layout for each in matrices)
        if median(each.rounding for each in matrices) > (
            NOISE_ROUNDING if stands_out and is_same else ROUNDING_MAX
        ):
            found[name] = [each for each in group if each.relative >= NOISE_RELATIVE]
    return found


def _noise(layers: dict[str, list[TensorChange]]) -> Finding:
    hit = [each for group in layers.values() for each in group]
    worst = max(hit, key=lambda each: each.relative)
    names = sorted(layers, key=lambda name: -max(each.relative for each in layers[name]))
    place = names[0] if len(names) == 1 else f"{len(names)} layers"
    return finding(
        "weights.noise",
        f"noise in {place}: {len(hit)} tensor(s) changed by up to {_percent(worst.relative)}, in no direction",
        names,
        relative=worst.relative,
        directions=median(each.directions for each in hit if each.directions is not None),
        tensors=len(hit),
    )


def _trained(changes: Sequence[TensorChange], everything: Sequence[TensorChange]) -> Iterator[Finding]:
    """Other weights, or the same ones rounded otherwise: quantizers leave floats alone, and what they do not is explained by rounding."""
    if not changes:
        return
    beyond = [each for each in changes if not _is_explained(each)]
    shifted = [each for each in changes if _is_shifted(each)]
    is_partial = any(each.is_identical and each.new_layout is changes[0].new_layout for each in everything)
    is_same = all(each.old_layout is each.new_layout for each in changes)
    directed = [each.directions for each in changes if each.directions is not None]
    has_direction = bool(directed) and median(directed) < NOISE_DIRECTIONS
    is_trained = beyond or 2 * len(shifted) > len(changes) or (is_same and (is_partial or has_direction))
    if not is_trained:
        sizes = sorted(each.relative for each in changes)
        summary = f"{_spread(changes)} the same weights to within rounding, by {_range(sizes)}"
        yield _changed("quantization.other", summary, changes)
        return
    # Biases and adapters start at zero, and may move by any factor.
    matrices = [each.moved for each in changes if len(each.dims) > 1 and math.isfinite(each.moved)]
    is_far = max(matrices, default=0.0) >= FAR_RELATIVE
    sizes = sorted(each.moved for each in changes)
    summary = f"{_spread(changes)} moved{' very far' if is_far else ''}, by {_range(sizes)}"
    hidden = len(changes) - len(beyond)
    if hidden:
        summary += f"; {hidden} of them by less than rounding, estimated"
    yield _changed("weights.trained_far" if is_far else "weights.trained", summary, changes)


def _is_shifted(change: TensorChange) -> bool:
    """The same quantizer, with the same scales, of weights that are a little different."""
    if change.old_layout is not change.new_layout:
        return False
    if change.new_layout in FLOATS:
        return True  # nothing is rounded otherwise
    is_like_training = (
        change.rounding <= SHIFTED_ROUNDING or LAYOUTS[change.new_layout].codes.width > SHIFTED_BITS
    )
    return is_like_training and change.kept_scales is not None and change.kept_scales >= SHIFTED_SCALES


def _changed(code: str, summary: str, changes: Sequence[TensorChange]) -> Finding:
    ordered = sorted(changes, key=lambda each: (-each.moved, -each.relative))
    relative = [each.relative for each in changes]
    moved = [each.moved for each in changes]
    directed = [each.directions for each in ordered if each.directions is not None]
    evidence: dict[str, float | str] = {
        "relative_max": max(relative),
        "relative_median": median(relative),
        "moved_max": max(moved),
        "moved_median": median(moved),
        "cosine_min": min(each.cosine for each in ordered),
        "rounding_median": min(median(each.rounding for each in ordered), 1e12),
        "tensors": len(ordered),
    }
    if directed:
        evidence["directions_median"] = median(directed)
    return finding(code, summary, _names(ordered), **evidence)


def _range(sizes: Sequence[float]) -> str:
    """Of sizes in ascending order."""
    return f"{_percent(sizes[0])} to {_percent(sizes[-1])}" if len(sizes) > 1 else _percent(sizes[0])


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to by its name, or the name itself."""
    found = _LAYER.search(name)
    return f"{found[1]}.{found[2]}" if found else name


def _layers(changes: Sequence[TensorChange]) -> dict[str, list[TensorChange]]:
    groups: dict[str, list[TensorChange]] = defaultdict(list)
    for each in changes:
        groups[layer_of(each.name)].append(each)
    return groups


def _spread(changes: Sequence[TensorChange]) -> str:
    layers = sorted({layer_of(each.name) for each in changes})
    count = f"{len(changes)} tensor" + ("" if len(changes) == 1 else "s")
    return f"{count} of {layers[0]}" if len(layers) == 1 and len(changes) > 1 else count


def _names(changes: Sequence[TensorChange]) -> list[str]:
    return [each.name for each in changes]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
