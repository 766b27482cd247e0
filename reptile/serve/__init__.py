"""A bundle over HTTP: teach tasks, predict, and the Open Inference Protocol. No torch."""
