"""``python -m d2net``."""

from d2net.cli import main

if __name__ == "__main__":
    main()
