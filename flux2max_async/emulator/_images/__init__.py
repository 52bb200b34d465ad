"""Draws the pictures that the emulator serves; `scenes.draw` is the entry point."""
