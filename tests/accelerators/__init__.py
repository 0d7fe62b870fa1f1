"""Models on other runtimes than the tests' own; `make accelerators` runs each module with the build that it is about."""
