"""Local metadata that a pod has too.

Where `run` starts a pod, the launcher's own disk has the records of the run, step and task, which a
metadata service would show to the pod. A card cannot be drawn without them, so the pod writes them
for itself first.
"""

import os

from metaflow.plugins.metadata_providers.local import LocalMetadataProvider


class MetadataInPod(LocalMetadataProvider):
    def register_task_id(self, run_id, step_name, task_id, attempt=0, tags=None, sys_tags=None):
        if os.environ.get("METAFLOW_KUBERNETES_WORKLOAD"):
            labels = (tags, sys_tags)
            self._ensure_meta("flow", None, None, None)
            self._ensure_meta("run", run_id, None, None, *labels)
            self._ensure_meta("step", run_id, step_name, None)
            self._ensure_meta("task", run_id, step_name, task_id, *labels)
        return super().register_task_id(run_id, step_name, task_id, attempt, tags, sys_tags)
