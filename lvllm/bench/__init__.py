"""Measures a server: `load` sends requests, `speed` makes rates of their times, `measure` goes
through all combinations of prompts and users, and `text` and `plot` show the results."""
