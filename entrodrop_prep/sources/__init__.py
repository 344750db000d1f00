"""Files and datasets of the Hub as numbered rows."""
