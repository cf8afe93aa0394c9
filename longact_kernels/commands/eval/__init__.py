"""`longact eval`: long-context tasks by lm-evaluation-harness, its own tasks and its own scorer."""
