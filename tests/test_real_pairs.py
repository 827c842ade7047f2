"""The flow on pairs that nobody wrote for it: placeholders, markup, odd spaces and accents."""

import subprocess
import sys
from pathlib import Path

from test_template_flow import artifacts, run


def test_message_catalogues_of_other_projects(tmp_path):
    script = Path(__file__).with_name("real_pairs.py")
    subprocess.run([sys.executable, str(script), "pairs.tsv"], cwd=tmp_path, check=True, timeout=60)
    code, output = run(tmp_path, "--data", "pairs.tsv", "--epochs", "9", seconds=1500)
    assert code == 0, output
    found = artifacts(tmp_path, "evaluate")
    assert len(found["examples"]) > 5000 and len(found["held_out"]) > 500
    assert found["scores"]["chrf"] > found["scores"]["baseline_chrf"] + 2
    texts = "".join(source + target for source, target in found["examples"])
    assert all(odd in texts for odd in ("%s", "%(", "<", "\u00a0", "é", "{"))
