"""`python -m dagger_operator.cli` is `daggerctl`."""

from dagger_operator.cli.app import main

if __name__ == "__main__":
    main()
