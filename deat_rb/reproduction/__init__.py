"""Studies: runs described by one file and shared among processes, and the paper's tables and figures from them."""
