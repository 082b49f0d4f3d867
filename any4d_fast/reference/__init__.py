"""The operators in plain PyTorch: float64 oracle of the tests and eager fallback."""
