"""A proxy for the energy of one inference: for comparing versions with each other, and for nothing else. Pure.

    energy = bytes moved between memory and processor x pJ a byte + operations x pJ an operation

The prices are those of 45 nm at 0.9 V in Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9:
1.3 to 2.6 nJ for 64 bits from DRAM, of which the lower is taken, and 3.7 and 0.9 pJ for a multiplication and an addition of 32-bit floats.
Newer memory takes a fraction of that, and so do operations of fewer bits: what is compared is traffic, weighted. Caches, static power, the
radio and everything else that a device does are left out.
"""

from typing import Final

DRAM_PJ_PER_BYTE: Final = 1300 / 8
OPERATION_PJ: Final = (3.7 + 0.9) / 2
"""Half of a multiplication and an addition, as operations are counted (`scorecard/resources.py`)."""

MODEL: Final = (
    f"Energy is a proxy, for comparisons only: {DRAM_PJ_PER_BYTE:g} pJ for each byte between memory and processor and {OPERATION_PJ:g} pJ"
    " for each operation (45 nm; Horowitz, ISSCC 2014)."
)

_PJ_PER_MJ: Final = 1e9


def energy_mj(operations: int, moved_bytes: int) -> float:
    """Millijoules of one inference by the proxy."""
    return (operations * OPERATION_PJ + moved_bytes * DRAM_PJ_PER_BYTE) / _PJ_PER_MJ
