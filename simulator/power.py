"""The power of a device: when it goes, nothing that was going on there is ever finished."""


class PowerCutError(Exception):
    """The power went in the middle of something; never an error that the device's own code may handle."""
