"""Raw images in, prepared data out: sources, the starter dataset, splits and hashes.

Not for sampling tasks: what leaves this room is one array of images and a table of its classes.
"""
