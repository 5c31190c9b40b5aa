"""Run the command line with `python -m tcomm`."""

from tcomm.cli.app import main

if __name__ == "__main__":
    main()
