"""The pipeline's stages and what holds them together, as components of Kubeflow Pipelines.

Each is a typed signature and one call into `components.artifacts`, as only its own source travels:
it runs in the project's image, which has everything else. How they are joined is in `pipeline`.

The modules `stages` and `control` define the components; `artifacts` does their work, in a pod too,
where KFP has no decorator to define a component with. So nothing is imported here.
"""
