"""`python -m dagger_operator.evaluation`: a worker of a round's evaluation stage; docs/architecture.md, "Stages"."""

if __name__ == "__main__":  # before the other imports
    from dagger_operator.store.ending import end_on_sigterm

    end_on_sigterm()

import sys

from dagger_operator.evaluation.stage import STAGE, evaluate
from dagger_operator.store.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE, evaluate))
