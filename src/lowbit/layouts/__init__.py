"""Kernel layouts: one file each, a pack and unpack pair with a name and a version."""
