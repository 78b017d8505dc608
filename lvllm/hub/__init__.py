"""Models on hubs: what a repository holds, and how it comes to this machine."""
