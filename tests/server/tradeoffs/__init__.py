"""Trade-offs: what beats what, and what the report says."""
