"""Training: synthetic scenes with exact ground truth, in submodules; this package itself loads nothing."""
