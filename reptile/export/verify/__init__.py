"""Verification of a bundle: its graphs against eager PyTorch, and its files against the format."""

from reptile.export.verify.bundle import verify_bundle
from reptile.export.verify.running import read_manifest
from reptile.export.verify.several import verify_bundles

__all__ = ["read_manifest", "verify_bundle", "verify_bundles"]
