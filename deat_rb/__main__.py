"""Entry point of ``python -m deat_rb``, the same command as ``deat-rb``."""

from deat_rb.cli import main

if __name__ == "__main__":
    main(prog_name="deat-rb")
