from pathlib import Path

from dashboards.drawing import drawn
from dashboards.fleet import FLEET
from dashboards.run import RUN

for board in (FLEET, RUN):
    Path(f"helm/dagger-operator/files/dashboards/{board.uid}.json").write_text(drawn(board))
