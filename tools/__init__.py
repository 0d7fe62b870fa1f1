"""Tools for people who work on Whimbrel; not shipped."""
