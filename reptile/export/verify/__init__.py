"""Verification of a bundle: its graphs against eager PyTorch, and its files against the format."""

from reptile.export.verify.bundle import verify_bundle
from reptile.export.verify.several import verify_bundles

__all__ = ["verify_bundle", "verify_bundles"]
