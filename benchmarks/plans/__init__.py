"""Plans for published models on machines that people have, as docs/plans.md shows them."""
