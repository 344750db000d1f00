"""Launcher for a checkout: ``python cli.py score ...`` is ``entrodrop score ...`` without installing."""

from entrodrop_prep.cli import main

if __name__ == "__main__":
    main()
