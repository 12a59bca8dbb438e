"""RobustBench's format: exports of a run, registration with `robustbench.load_model`, and `robustbench.benchmark`."""
