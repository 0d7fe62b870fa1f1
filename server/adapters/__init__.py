"""The edge of the server: broker, database, files, keys, clock."""
