"""What several tests use: models, servers, rows, and this machine's own Hub."""
