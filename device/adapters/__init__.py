"""The edge of a device: sockets, files, clocks, processes and inference engines, each behind a port of `device.ports`."""
