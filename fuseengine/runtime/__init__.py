"""The run side: frames, images, random numbers, the executor. Imports no torch."""
