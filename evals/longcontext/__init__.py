"""What a model still finds in a long context, scored by string match and by the answer's log-probability."""
