"""RobustBench: export in its format, registration with `robustbench.load_model`, and `robustbench.benchmark`."""
