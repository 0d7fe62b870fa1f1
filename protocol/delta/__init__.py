"""The delta file: its byte layout, codecs, writer and push reader. See README.md in this folder."""
