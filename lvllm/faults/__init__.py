"""How errors reach the user: a process's in one line, a request's as its end, NaN by its layer."""
