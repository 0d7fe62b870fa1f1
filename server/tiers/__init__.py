"""Hardware tiers: what the devices of a kind can hold and do, and whether a release fits them before it is published."""
