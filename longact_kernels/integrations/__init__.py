"""Glue to transformers, TRL and accelerate: the only place that imports them, with `rl/`."""
