"""`python -m dagger_operator.rollout`: a worker of a round's rollout stage; docs/architecture.md, "Stages"."""

import sys

from dagger_operator.rollout.round import STAGE, rollout
from dagger_operator.store.stage import main

if __name__ == "__main__":
    sys.exit(main(STAGE, rollout))
