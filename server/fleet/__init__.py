"""The devices: what they reported about themselves."""
