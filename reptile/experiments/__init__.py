"""Published experiments: their settings, their repetition over seeds, and transfer between data."""
