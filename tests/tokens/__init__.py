"""Keys that never leave a token: PKCS #11, with SoftHSM in the place of the device."""
