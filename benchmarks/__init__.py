"""Measurements of FuseEngine against its peers; each module is a command, see `--help`."""
