"""Scores from vLLM servers over HTTP: several at once, that may be busy, break, or come back."""
