"""Torch in, ONNX out: the bundle that adapts to new tasks inside ONNX Runtime, verified.

`gradient` traces the gradient of one inner step, `graphs` builds the four graphs around it,
`closed_form` those of learners without steps, `write` writes the folder, `verify` checks it against
eager PyTorch. For using a bundle see `runtime`.
"""
