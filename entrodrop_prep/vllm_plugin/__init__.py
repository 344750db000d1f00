"""What runs inside vLLM's own processes. Nothing else of this package is imported here."""
