"""RobustBench integration: export in its format, registration with `robustbench.load_model`, and benchmarking."""
