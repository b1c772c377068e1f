"""llmlite makes a Hugging Face language model fit the machine at hand, measures what that cost, and serves it."""

__version__ = "0.1.0"
