"""``python -m entrodrop_prep``."""

from entrodrop_prep.cli import main

if __name__ == "__main__":
    main()
