"""The pipeline's stages and what joins them, as components of Kubeflow Pipelines.

Each is a typed signature and one call into `components.artifacts`, as only its own source travels:
it runs in the project's image, which has everything else. They are joined in `pipeline`.

Nothing is imported here: in a pod, where `kfp.dsl` has no decorators, `artifacts` alone is loaded.
"""
