"""What was measured of a quantized file on a text, token by token. Pure data."""

from msgspec import Struct


class Reading(Struct, frozen=True, kw_only=True):
    """One file on one text, at each predicted token in the order of the text's runs.

    Attributes:
        nll: Negative log-likelihood of the token that stands there, in nats.
        kl: Divergence KL(float model || file) of the predictions, in nats; over all of the vocabulary.
        same: Whether both hold the same token for the likeliest.
    """

    nll: tuple[float, ...]
    kl: tuple[float, ...]
    same: tuple[bool, ...]


Readings = dict[str, Reading]
"""By name of the text."""
