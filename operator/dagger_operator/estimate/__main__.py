"""`python -m dagger_operator.estimate`: the formulas against published figures, as `docs/estimate.md` shows them."""

from dagger_operator.estimate.published import table

if __name__ == "__main__":
    print("\n".join(table()))
