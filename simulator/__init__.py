"""Fleets of the real agent: live over a real broker (`live`), and twins of the device's ports (`disk`)."""
