"""What a run has shown: its record, the checks on it, and the page that presents it. Pure: a record in, text out."""
