"""`python -m dagger_operator.evaluation`: a worker of a round's evaluation stage; docs/architecture.md, "Stages"."""

import sys

from dagger_operator.evaluation.stage import STAGE, evaluate
from dagger_operator.store.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE, evaluate))
