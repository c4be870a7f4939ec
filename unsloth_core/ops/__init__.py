"""The kernel toolbox: every op works alone in anyone's PyTorch code, with its hand-derived backward."""
