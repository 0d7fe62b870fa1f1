"""The agent that runs on a device: a pure core (`agent`), effects in order (`executor`), a thin edge (`adapters`)."""
