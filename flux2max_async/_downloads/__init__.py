"""Downloading and saving images."""
