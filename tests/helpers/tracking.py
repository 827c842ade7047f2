"""Run the flow with the real W&B client and a W&B server on loopback."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from flow_testing import FLOW, clean_environment
from helpers.wandb_server import StandIn

KEY = "k3" * 43  # 86 characters, as new keys have


class Done(NamedTuple):
    folder: Path
    code: int
    output: str
    server: StandIn


def tracked(
    folder, server, *arguments, url=None, flow=FLOW, before=(), command="run", **environment
):
    """Run the flow as a user does, with W&B at the stand-in or at `url`."""
    settings = {
        **clean_environment(folder),
        "WANDB_BASE_URL": url or server.url,
        "WANDB_API_KEY": KEY,
        "WANDB_PROJECT": "project",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [*before, sys.executable, str(flow), "--no-pylint", command, *arguments],
        cwd=folder,
        env={name: value for name, value in settings.items() if value is not None},
        timeout=600,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Done(folder, done.returncode, done.stdout, server)
