"""Fusion networks in PyTorch, their registry and their checkpoints (compile side)."""
