"""Training: synthetic scenes with exact ground truth. Import the submodules; importing this package loads nothing else."""
