"""Proving that a directory is what its manifest says, and showing what it holds."""
