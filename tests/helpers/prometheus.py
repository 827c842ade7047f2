"""A real Prometheus, with the rules that users copy."""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from helpers.repository import TEMPLATES
from serve_testing import free_port


class Prometheus:
    """Prometheus on a free port; it collects from the targets, and evaluates, each second."""

    def __init__(self, *targets):
        self.folder = tempfile.mkdtemp(prefix="prometheus-", dir="/tmp")
        self.url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(TEMPLATES / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": "translator", "static_configs": [{"targets": targets}]}
            ],
        }
        Path(self.folder, "prometheus.yml").write_text(yaml.safe_dump(config))
        command = [
            "prometheus",
            "--config.file=prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self.log = Path(self.folder, "log").open("w+")
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=self.log, stderr=self.log)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.folder)

    def get(self, path, **parameters):
        """Return the data of an answer of the API; {} while it is not up."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None
        except OSError:
            return {}

    def query(self, expression):
        """Return [(labels, value), ...]."""
        found = self.get("query", query=expression).get("result", [])
        return [(series["metric"], float(series["value"][1])) for series in found]

    def wait_for(self, expression, seconds=200):
        """Wait until a query gives a result; return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(AssertionError):
                found = self.query(expression)
                if found:
                    return found
            time.sleep(0.5)
        raise AssertionError(f"no result for {expression}")

    def alerts(self):
        """Return {name: "pending" or "firing"}."""
        found = self.get("alerts").get("alerts", [])
        return {alert["labels"]["alertname"]: alert["state"] for alert in found}


def firing(folder, series, minutes):
    """Return the names of the alerts that fire after each of these minutes, as promtool says."""
    names = re.findall(r"alert: (\w+)", (TEMPLATES / "alerts.yaml").read_text("utf-8"))
    tests = {
        "rule_files": [str(TEMPLATES / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": name, "values": values} for name, values in series.items()
                ],
                # As no alert is expected, promtool reports every alert that fires.
                "alert_rule_test": [
                    {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": []}
                    for minute in minutes
                    for name in names
                ],
            }
        ],
    }
    (folder / "test.yaml").write_text(yaml.safe_dump(tests))
    command = ["promtool", "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100)
    said = done.stdout + done.stderr
    assert "parse" not in said, said
    found = re.findall(r"alertname: ?(\w+), time: (\w+)", said)
    return {(name, time) for name, time in found}
