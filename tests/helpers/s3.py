"""S3 on this machine: keys that nobody checks, and the Metaflow extension that uses them."""

from pathlib import Path

KEYS = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
}
# Replaces Outerbounds' own login, for a test's process and for its pods.
EXTENSION = Path(__file__).parent / "remote/extension"
# Prints the stored artifacts and cards of a run, pickled.
READ_RUN = Path(__file__).parent / "remote/read_run.py"
