"""Published experiments: settings, repetition over seeds, and transfer between datasets."""
