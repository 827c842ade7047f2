"""What the two stand-ins share: a container as Kubernetes describes it, run by docker."""

import subprocess

POD = {
    "metadata.namespace": "default",
    "metadata.uid": "none",
    "spec.serviceAccountName": "default",
    "status.hostIP": "127.0.0.1",
}  # what a pod can be told about itself, beside its name


def docker(*arguments, seconds=600):
    return subprocess.run(
        ["docker", *arguments],
        timeout=seconds,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def remove(label):
    """Remove every container with this label, running or not."""
    found = docker("ps", "--all", "--quiet", "--filter", f"label={label}").stdout.split()
    if found:
        docker("rm", "--force", *found)


class Cluster:
    """What a cluster adds to a pod: variables (here the keys of S3), secrets and its own images."""

    def __init__(self, label, variables, secrets=None, images=None):
        self.label, self.variables, self.secrets, self.images = (
            label,
            variables,
            secrets or {},
            images or {},
        )

    def command(self, container, name, fill=str, options=()):
        """The `docker run` of a container; `fill` puts values in the place of what is in {{}}."""
        variables = {}
        for source in container.get("envFrom") or []:
            variables |= self.secrets[source["secretRef"]["name"]]
        for variable in container.get("env") or []:
            if variable.get("value") is not None:
                variables[variable["name"]] = fill(variable["value"])
            elif variable.get("valueFrom"):
                field = variable["valueFrom"]["fieldRef"]["fieldPath"]
                variables[variable["name"]] = name if field == "metadata.name" else POD[field]
        settings = [f"--env={key}={value}" for key, value in (self.variables | variables).items()]
        program, *arguments = [
            fill(part) for part in [*container["command"], *(container.get("args") or [])]
        ]
        image = self.images.get(container["image"], container["image"])
        return [
            "run",
            f"--name={name}",
            f"--label={self.label}",
            *options,
            *settings,
            "--entrypoint",
            program,
            image,
            *arguments,
        ]
