"""A finished directory to a dataset repository on the Hub."""
