"""Tasks of lm-evaluation-harness, run on an artifact by either engine."""
