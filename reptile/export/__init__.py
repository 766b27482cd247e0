"""Torch in, ONNX out: the bundle that adapts to new tasks inside ONNX Runtime, and its proof.

`step` traces the gradient of one inner step, `graphs` builds the four graphs around it, `bundle`
writes the folder, `verify` checks it against eager PyTorch. Not for using a bundle: see `runtime`.
"""
