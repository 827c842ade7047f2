"""For tests only: Metaflow asks no server outside this machine.

A deployment never has this folder on its PYTHONPATH. The Outerbounds plug-ins ask their own server
for three things: keys for S3, the address of the cluster, and what @nvidia may use. Here S3 takes
boto3's own keys, and this file gives the other two answers.
"""

import os as _os

import requests as _requests
from metaflow_extensions.outerbounds import plugins as _plugins
from metaflow_extensions.outerbounds.plugins import auth_server as _auth_server

DEFAULT_AWS_CLIENT_PROVIDER = "boto3"
_get = _requests.get


def _cluster(path):
    if path != "/generate/k8s":
        raise RuntimeError(f"no stand-in for {path}")
    return {"endpoint": _os.environ["STAND_IN_CLUSTER"], "token": "none"}


def _nvidia(url, *arguments, **options):
    if not url.endswith("/generate/nim"):
        return _get(url, *arguments, **options)
    answer = _requests.Response()
    answer.status_code = 200
    answer._content = (
        b'{"nvcf": {"api_key": "none", "functions": [{"model_key": "metaflow_task_executor",'
        b' "gpu": 1, "gpu_type": "L40S", "id": "none"}]}}'
    )
    return answer


_auth_server.get_token = _cluster
_plugins.USE_CSPR_ROLE_ARN_IF_SET = (
    None  # a role that only Outerbounds' own provider of keys understands
)
if _os.environ.get("STAND_IN_NVIDIA"):
    _requests.get = _nvidia
