"""The flow on pairs that nobody wrote for it: placeholders, markup, odd spaces and accents."""

import pytest
from flow_testing import artifacts, run
from helpers import real_pairs

pytestmark = pytest.mark.slow


def test_message_catalogues_of_other_projects(tmp_path):
    real_pairs.write(tmp_path / "pairs.tsv", longest=40)  # short ones: much sooner learnt
    code, output = run(tmp_path, "--data", "pairs.tsv", "--epochs", "20", seconds=1500)
    assert code == 0, output
    found = artifacts(tmp_path, "evaluate")
    assert len(found["examples"]) > 5000
    assert 400 < len(found["held_out"]) < 600  # a tenth; equal texts stay on one side
    assert found["scores"]["chrf"] > found["scores"]["baseline_chrf"] + 2
    texts = "".join(source + target for source, target in found["examples"])
    assert all(odd in texts for odd in ("%s", "%(", "<", "\u00a0", "é", "{"))
