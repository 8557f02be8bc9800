"""The real parts: a Docker engine, the image, and GitHub's runner."""
