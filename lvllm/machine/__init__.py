"""The host: which CPUs each rank computes on, how near they are to a GPU, what memory is free."""
