"""What compression cost: perplexity, divergence from the base, bytes, memory and speed of an artifact."""
