"""Measurements that documents quote; each prints one table, and JSON lines with `--json`."""
