"""Verification of a bundle: its graphs against eager PyTorch, and its files against the format."""

from reptile.export.verify.parity import verify_bundle

__all__ = ["verify_bundle"]
