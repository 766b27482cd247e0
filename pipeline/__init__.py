"""The stages as a Kubeflow pipeline: its graph, its compiled form, its runs and schedules."""
