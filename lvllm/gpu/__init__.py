"""The GPU lane: experts whose weights stay on the host, computed beside or on a GPU."""
