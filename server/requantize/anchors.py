"""Several installed files side by side: which scales the chosen file takes, and at which code each of its weights costs a device nothing.

Pure. Scales belong to blocks, and each block takes those that most of the fleet has. Devices with other scales have other codes for the same
weights: the delta coder expects a weight where the device's own falls on the new scale (SPEC 6.11), so that this is the code which is cheapest to send.
"""

from collections.abc import Sequence

import numpy as np

from protocol.delta.layouts import LAYOUTS
from server.diagnosis.weights import Flags
from server.requantize.codes import CodedRows, Codes
from server.requantize.descent import Price


def leading_rows(held: Sequence[CodedRows], shares: Sequence[float]) -> CodedRows:
    """Block by block, scales and codes as most of the fleet has them; the first of files with equal shares.

    Args:
        held: The same rows of each file.
        shares: Of the fleet, in the same order.
    """
    first = held[0]
    votes = np.stack(
        [
            sum(share * _same_scales(one, other) for share, other in zip(shares, held, strict=True))
            for one in held
        ]
    )
    leader = votes.argmax(axis=0)
    if not leader.any():
        return first
    blocks = np.arange(len(leader))
    fields = {name: np.stack([each.fields[name] for each in held])[leader, blocks] for name in first.fields}
    data = LAYOUTS[first.layout].join(fields).tobytes()
    return CodedRows.read(first.layout, data, first.codes.shape[1])


def anchors_of(rows: CodedRows, held: Sequence[CodedRows]) -> Codes:
    """Codes on the scales of `rows` that each file's devices need no bits for.

    Returns:
        Shape (rows, columns, files).
    """
    shape = rows.codes.shape
    anchors = np.empty((*shape, len(held)), np.int16)
    for index, each in enumerate(held):
        same = _same_scales(rows, each)
        own = np.repeat(same, rows.codes.size // len(same)).reshape(shape)
        there = each.codes if same.all() else rows.nearest(each.weights(each.codes))
        anchors[..., index] = np.where(own, each.codes, there)
    return anchors


def cheapest_codes(anchors: Codes, price: Price) -> Codes:
    """Of each weight, the code among those that devices have which costs the fleet least; the first file's where several do.

    Args:
        anchors: Shape (rows, columns, files).
        price: With the shares of these files.

    Returns:
        Shape (rows, columns).
    """
    codes = anchors[..., 0]
    least = price.of_each(codes, anchors)
    for index in range(1, anchors.shape[-1]):
        other = anchors[..., index]
        cost = price.of_each(other, anchors)
        codes = np.where(cost < least, other, codes)
        least = np.minimum(cost, least)
    return codes


def _same_scales(one: CodedRows, other: CodedRows) -> Flags:
    """Of each block, whether both have the same weights for the same codes."""
    codes = LAYOUTS[one.layout].codes.name
    same = np.ones(len(one.fields[codes]), np.bool_)
    for name in one.fields:
        if name != codes:
            same &= (one.fields[name] == other.fields[name]).all(axis=1)
    return same
