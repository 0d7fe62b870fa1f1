"""Made-up readings of files with a known distance from each other."""

import numpy as np

from server.requantize.readings import Reading
from server.requantize.texts import RUN_TOKENS, RUNS

COUNT = RUNS * (RUN_TOKENS - 1)


def reading(seed: int, nll: float, kl: float, flips: float, noise: float = 0.05) -> Reading:
    """Of a file: the text is as hard as `seed` draws it for all files alike, the file's own part has `noise`.

    Args:
        seed: Of the file's own part.
        nll: Mean, about.
        kl: Likewise.
        flips: Likewise.
        noise: Standard deviation of the file's own part, of the mean.
    """
    text, own = np.random.default_rng(0), np.random.default_rng(seed)
    hard = text.gamma(1.0, 1.0, COUNT)
    ranks = text.random(COUNT)
    own_kl = kl * hard * own.gamma(noise**-2, noise**2, COUNT)  # of mean 1
    return Reading(
        nll=tuple((nll * hard + noise * own.normal(0, 1, COUNT)).tolist()),
        kl=tuple(own_kl.tolist()),
        same=tuple((ranks > flips).tolist()),
    )
