"""Every power cut of an update that a file system permits, and what the next start makes of it: `make crash-points`."""
