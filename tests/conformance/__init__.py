"""The public tuf-conformance suite over the device's verification: `make conformance SUITE=FOLDER`."""
