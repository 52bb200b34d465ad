"""Draws the images that the emulator serves; the entry point is `scenes.draw`."""
