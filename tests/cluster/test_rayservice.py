"""templates/rayservice.yaml: the config of the laptop, as Kubernetes and KubeRay accept it."""

import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from helpers.loopback import served
from helpers.pages import blocks
from helpers.repository import ROOT, check_for_github

TEMPLATES = ROOT / "templates"
CRD = (
    ROOT.parent / "shared/schemas/ray.io_rayservices.yaml"
)  # KubeRay's published schema, where somebody has put it


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all((TEMPLATES / "rayservice.yaml").read_text("utf-8")))


@pytest.fixture(scope="module")
def service(documents):
    return documents[0]


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((TEMPLATES / "serve_config.yaml").read_text("utf-8"))


def strict(schema):
    """The schema, refusing unknown keys as `kubectl apply --validate=strict` does."""
    if isinstance(schema, dict):
        if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            schema = {"additionalProperties": False, **schema}
        if "x-kubernetes-int-or-string" in schema:
            return {"type": ["integer", "string"]}
        return {key: strict(value) for key, value in schema.items()}
    return [strict(each) for each in schema] if isinstance(schema, list) else schema


@pytest.mark.needs_file
@pytest.mark.skipif(
    not CRD.exists(), reason=f"KubeRay's schema is not at {CRD}; download it to check against it"
)
def test_kuberay_knows_every_key(service):
    version = next(
        each for each in yaml.safe_load(CRD.read_text())["spec"]["versions"] if each["name"] == "v1"
    )
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(service, schema)
    wrong = json.loads(json.dumps(service))
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(wrong, schema)


def test_config_is_that_of_the_laptop_and_in_order(service, config, tmp_path):
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == config
    for name in ("check_serve_config.py", "template_ray_serve.py"):
        (tmp_path / name).write_bytes((TEMPLATES / name).read_bytes())
    (tmp_path / "its.yaml").write_text(service["spec"]["serveConfigV2"])
    done = subprocess.run(
        [sys.executable, "check_serve_config.py", "its.yaml"],
        cwd=tmp_path,
        timeout=400,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


class Discovery(http.server.BaseHTTPRequestHandler):
    """What `kubectl` asks an API server before it looks at a file: which kinds there are."""

    KINDS = {
        "ray.io/v1": "RayService",
        "networking.k8s.io/v1": "NetworkPolicy",
        "policy/v1": "PodDisruptionBudget",
    }

    def do_GET(self):
        path = self.path.partition("?")[0]
        if kind := self.KINDS.get(path.removeprefix("/apis/")):
            answer = {
                "kind": "APIResourceList",
                "groupVersion": path.removeprefix("/apis/"),
                "resources": [
                    {
                        "name": f"{kind.lower()}s",
                        "kind": kind,
                        "namespaced": True,
                        "verbs": ["create", "get", "patch"],
                    }
                ],
            }
        else:
            versions = {
                name: {"groupVersion": name, "version": "v1"}
                for name in self.KINDS
                if path == "/apis"
            }
            answer = {
                "kind": "APIGroupList",
                "apiVersion": "v1",
                "groups": [
                    {"name": name.split("/")[0], "versions": [each], "preferredVersion": each}
                    for name, each in versions.items()
                ],
            }
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.mark.skipif(
    not shutil.which("kubectl"), reason="no kubectl: install Debian's package kubernetes-client"
)
def test_kubectl_reads_the_same(documents, tmp_path):
    with served(Discovery) as server:
        done = subprocess.run(
            [
                "kubectl",
                "--server",
                server.url,
                "--cache-dir",
                str(tmp_path),
                "create",
                "--dry-run=client",
                "--validate=false",
                "-o",
                "yaml",
                "-f",
                str(TEMPLATES / "rayservice.yaml"),
            ],
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "KUBECONFIG": os.devnull},
        )
    assert done.returncode == 0, done.stderr
    read = list(yaml.safe_load_all(done.stdout))
    for each in read:
        each["metadata"].pop("namespace")
    assert read == documents


def test_table_of_sizes_counts_right():
    rows = re.findall(
        r"^\| \w+ \| (\d+) \| (\d+) \| (\d+) \|$", (ROOT / "docs/ship.md").read_text("utf-8"), re.M
    )
    assert len(rows) == 3
    for each in rows:
        rate, for_50, for_200 = map(int, each)
        assert (for_50, for_200) == (math.ceil(50 / (0.8 * rate)), math.ceil(200 / (0.8 * rate)))


def test_what_the_head_needs_is_counted(service):
    """The page names the sum of both containers; the second is as KubeRay's default."""
    cluster = service["spec"]["rayClusterConfig"]
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    autoscaler = cluster["autoscalerOptions"]["resources"]
    assert autoscaler["requests"] == autoscaler["limits"] == {"cpu": "500m", "memory": "512Mi"}
    assert container["resources"]["requests"] == {"cpu": "1", "memory": "3Gi"}
    page = (ROOT / "docs/ship.md").read_text("utf-8")
    assert "The head takes 1.5 CPUs and 3.5 GiB" in " ".join(page.split())


def groups(service):
    cluster = service["spec"]["rayClusterConfig"]
    return cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]


def test_workers_have_what_replicas_ask_for(service, config):
    head, workers = groups(service)
    (deployment,) = config["applications"][0]["deployments"]
    cpus = deployment["ray_actor_options"]["num_cpus"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert float(container["resources"]["limits"]["cpu"]) % cpus == 0
    per_worker = float(container["resources"]["limits"]["cpu"]) // cpus
    assert workers["maxReplicas"] * per_worker >= deployment["autoscaling_config"]["max_replicas"]
    assert workers["minReplicas"] * per_worker >= deployment["autoscaling_config"]["min_replicas"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    grace = deployment["graceful_shutdown_timeout_s"]
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > grace
    for group in (head, workers):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > grace
        (container,) = group["template"]["spec"]["containers"]
        assert {8000} <= {each["containerPort"] for each in container["ports"]}


def test_pods_run_without_rights(service):
    for group in groups(service):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert (
            pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 1000
        )
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {each["mountPath"] for each in container["volumeMounts"]} == {"/tmp", "/dev/shm"}
        assert {each["name"] for each in container["volumeMounts"]} == {
            each["name"] for each in pod["volumes"]
        }
    # KubeRay adds the autoscaler's container to the head: level "restricted" looks at it too.
    autoscaler = service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert autoscaler["securityContext"] == container["securityContext"]
    assert autoscaler["volumeMounts"] == container["volumeMounts"]
    assert groups(service)[1]["template"]["spec"]["automountServiceAccountToken"] is False
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


def test_versions_and_names(service, documents):
    pinned = re.search(
        r"^ray\[serve\]==(\S+)$", (TEMPLATES / "requirements-rayserve.txt").read_text(), re.M
    )[1]
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == pinned
    assert len(service["metadata"]["name"]) <= 40
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups(service)}
    assert len(images) == 1
    for other in documents[1:]:
        assert other["metadata"]["name"] == service["metadata"]["name"]


def test_what_selects_pods_finds_them(service, documents):
    _, policy, budget = documents
    assert (policy["kind"], budget["kind"]) == ("NetworkPolicy", "PodDisruptionBudget")
    for group in groups(service):
        assert (
            policy["spec"]["podSelector"]["matchLabels"].items()
            <= group["template"]["metadata"]["labels"].items()
        )
    # KubeRay adds ray.io/node-type. maxUnavailable would need a controller that Kubernetes knows.
    assert (
        budget["spec"]["selector"]["matchLabels"]["app"] == "translator"
        and budget["spec"]["minAvailable"] == 1
    )
    open_to_all = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == [[{"port": 8000}]]


def test_prometheus_finds_the_metrics_and_gets_in(service, documents):
    for group in groups(service):
        port = group["rayStartParams"]["metrics-export-port"]
        annotations = group["template"]["metadata"]["annotations"]
        assert annotations == {"prometheus.io/scrape": "true", "prometheus.io/port": port}
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "metrics", "containerPort": int(port)} in container["ports"]
    rules = [
        rule for rule in documents[1]["spec"]["ingress"] if {"port": 8080} in rule.get("ports", [])
    ]
    assert [rule["from"] for rule in rules] == [
        [
            {
                "namespaceSelector": {},
                "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
            }
        ]
    ]


def valid_for_kubernetes(path):
    """Check the documents of a file whose kinds Kubernetes itself has, strictly."""
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_policy_and_budget_are_valid(tmp_path):
    said = valid_for_kubernetes(TEMPLATES / "rayservice.yaml")
    assert "networkpolicy/translator" in said and "poddisruptionbudget/translator" in said
    wrong = (TEMPLATES / "rayservice.yaml").read_text("utf-8").replace("policyTypes", "policyType")
    (tmp_path / "wrong.yaml").write_text(wrong)
    with pytest.raises(AssertionError, match="policyType"):
        valid_for_kubernetes(tmp_path / "wrong.yaml")


def pod_with(service, **changes):
    """Return a Pod as the workers are, with changes of its container, and of the pod itself."""
    pod = json.loads(json.dumps(groups(service)[1]["template"]["spec"]))
    pod["containers"][0] |= changes.pop("container", {})
    pod |= changes
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": pod}


def test_manifests_of_the_pages_are_valid(service, tmp_path):
    ingress, mounts = [
        block for block in blocks("operate.md", "yaml") if block.startswith(("api", "# In ray"))
    ][::-1]
    gpu = next(block for block in blocks("ship.md", "yaml") if "nvidia.com/gpu" in block)
    volumes = yaml.safe_load(mounts)
    pods = [
        pod_with(service, container=yaml.safe_load(gpu)),
        pod_with(
            service,
            container={"volumeMounts": volumes["volumeMounts"]},
            volumes=volumes["volumes"],
        ),
    ]
    text = ingress + "---\n" + yaml.safe_dump_all(pods)
    (tmp_path / "all.yaml").write_text(text)
    said = valid_for_kubernetes(tmp_path / "all.yaml")
    assert "ingress/translator" in said and said.count("pod/worker") == 2
    # KubeRay names the service of the app so.
    assert f"{service['metadata']['name']}-serve-svc" in ingress


def test_pipeline_for_gitlab_is_one_and_does_the_same(tmp_path):
    workflow, pipeline = [
        next(block for block in blocks("ship.md", "yaml") if block.startswith(start))
        for start in ("name: image", "build-image:\n")
    ]
    (tmp_path / "gitlab.yml").write_text(pipeline)
    command = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema"]
    command += ["vendor.gitlab-ci", tmp_path / "gitlab.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in (
        "pip install -r requirements.outerbounds.txt",
        "test_template_flow.py test_flow_mechanics.py",
        "test_template_ray_serve.py test_serve_mechanics.py",
        "python template_flow.py run --offline True",
        "python export_model.py",
        "python check_serve_config.py serve_config.yaml",
        "-f Dockerfile-rayserve .",
        "pip-audit --disable-pip -r lock.txt",
        "cyclonedx-py requirements lock.txt",
        "docker push",
    ):
        assert step in workflow and step in pipeline, step


def test_workflow_of_the_page_is_one_and_names_actions_by_commit(tmp_path):
    (block,) = [block for block in blocks("ship.md", "yaml") if block.startswith("name: image")]
    (tmp_path / "image.yml").write_text(block)
    check_for_github(tmp_path / "image.yml", "github-workflows")
    workflow = yaml.safe_load(block)
    assert workflow["permissions"] == {}
    (job,) = workflow["jobs"].values()
    assert "timeout-minutes" in job and set(job["permissions"]) == {"contents", "packages"}
    used = re.findall(r"uses: (\S+) # v", block)
    assert (
        used
        and len(used) == block.count("uses:")
        and all(re.search("@[0-9a-f]{40}$", each) for each in used)
    )
