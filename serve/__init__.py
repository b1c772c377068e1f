"""Serve a compressed model over HTTP as the OpenAI API does."""
