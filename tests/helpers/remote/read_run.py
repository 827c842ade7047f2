"""Print (successful, artifacts, cards, logs) of a run, by step, as a pickle.

    python read_run.py FLOW/RUN '{"step": "task id", ...}'

Under Argo with metadata kept in files, each pod leaves its records in the datastore; this script
fetches them from there first.
"""

import json
import pickle
import sys
from typing import Any

from metaflow import Run, namespace
from metaflow.cards import get_cards
from metaflow.datastore import FlowDataStore
from metaflow.metadata_provider.util import sync_local_metadata_from_datastore
from metaflow.metaflow_config import DATASTORE_LOCAL_DIR, DATASTORE_SYSROOT_S3
from metaflow.plugins import DATASTORES

name, tasks = sys.argv[1], json.loads(sys.argv[2])
flow, run = name.split("/")
s3 = next(datastore for datastore in DATASTORES if datastore.TYPE == "s3")
store = FlowDataStore(flow, None, storage_impl=s3, ds_root=DATASTORE_SYSROOT_S3)
for step, task in tasks.items():
    sync_local_metadata_from_datastore(
        DATASTORE_LOCAL_DIR, store.get_task_datastore(run, step, task)
    )
namespace(None)
finished: Any = Run(name)
found = {step.id: step.task for step in finished}
artifacts = {
    step: {artifact.id: artifact.data for artifact in task} for step, task in found.items()
}
cards = {step: [card.get() for card in get_cards(found[step])] for step in ("train", "evaluate")}
logs = {step: task.stdout + task.stderr for step, task in found.items()}
sys.stdout.buffer.write(pickle.dumps((finished.successful, artifacts, cards, logs)))
