"""`python -m lasar`: the `lasar` command, for programs that start modules, such as torchrun."""

from lasar.cli import main

if __name__ == "__main__":
    main()
