"""Exporting programs and stages to formats that other runtimes execute."""
