"""Studies: many runs from one file, shared among processes, and the tables and figures of the paper from them."""
