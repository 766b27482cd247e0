"""How functions become components: in the project's own image, nothing installed at run time."""

from functools import partial

from kfp import dsl

IMAGE = "reptile-train:latest"
"""What the images' build calls the one with torch and kfp; a run may name another."""

component = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
