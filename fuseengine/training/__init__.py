"""Training of the fusion models (needs the ``train`` extra)."""
