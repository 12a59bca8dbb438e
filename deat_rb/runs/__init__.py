"""Runs of `deat-rb train`: options, configuration, plan, run directory, curves and trackers."""
