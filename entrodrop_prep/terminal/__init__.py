"""What is shown on a terminal, and Ctrl-C."""
