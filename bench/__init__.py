"""Benchmarks beside the peers: `python -m bench`. Every speed and memory claim of the README comes from here."""
