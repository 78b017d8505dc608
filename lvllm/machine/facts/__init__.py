"""Facts about this machine. No fact fails: what cannot be read is None, which means unknown.

Functions that read files take the folder under which /proc, /sys and /run lie, so that tests can
make a machine up.
"""
