"""One plain PyTorch function per op: same names, same signatures, float64-safe, no Triton. The oracle of every test."""
