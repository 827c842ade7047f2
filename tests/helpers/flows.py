"""What a run of the flow has printed."""

import re


def epochs(output):
    """Return the epochs at which a loss was printed, in order."""
    return [float(epoch) for epoch in re.findall(r"'loss': .*'epoch': '([\d.]+)'", output)]
