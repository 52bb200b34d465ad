"""Requests, their input images, and the results of their tasks: immutable values without I/O of their own."""
