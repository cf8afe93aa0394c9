"""Glue to transformers, TRL and accelerate: what `tasks` and `commands` build on."""
