"""`python -m dagger_operator.estimate`: compares the formulas with published figures, as shown in `docs/estimate.md`."""

from dagger_operator.estimate.published import table

if __name__ == "__main__":
    print("\n".join(table()))
