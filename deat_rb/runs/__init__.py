"""What `deat-rb train` does and leaves behind: configuration, plan, run directory, curves and trackers."""
