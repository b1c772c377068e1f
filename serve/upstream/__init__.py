"""Another server in front of which this one stands: any OpenAI-compatible URL, or a vLLM that it starts itself."""
