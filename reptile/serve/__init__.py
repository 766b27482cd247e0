"""A bundle over HTTP: adapt to tasks, predict, and the Open Inference Protocol. No torch."""
