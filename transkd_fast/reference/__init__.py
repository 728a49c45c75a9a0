"""The truth: every op in plain differentiable PyTorch, one module per op. Imports torch only."""
