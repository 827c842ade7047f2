"""Recipes of docs/your-own-model.md: apply its diff to fresh templates, then do what the page says.

A test gives the heading of a part of the page, and a folder in which the data is:

    folder = recipes.apply("Classify texts", tmp_path)
    recipes.check_limits("Classify texts", folder)
    recipes.follow("Classify texts", folder)          every command of the part
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import flow_testing
from helpers.images import Container, build
from helpers.pages import blocks_in, commands_in, shows
from helpers.remote import pods
from helpers.repository import ROOT, template_files
from helpers.shell import WITHOUT_NETWORK, can_cut_network, clean, execute
from serve_testing import Server

MAX_ADDED = 60
UNCOUNTED = re.compile(r"requirements.*\.txt|test_.*\.py")


# -- The page --------------------------------------------------------------------------------------


def part_of_page(heading):
    """Return the text below `## heading`, up to the next heading of that level."""
    text = (ROOT / "docs/your-own-model.md").read_text("utf-8")
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))[heading]


def commands(heading):
    """Return [(command, lines of output that follow it), ...] of a part of the page."""
    return commands_in(part_of_page(heading))


def diff(heading):
    """Return (name, text) of the diff that a part of the page links to."""
    (link,) = re.findall(r"\]\((recipes/\S+\.diff)\)", part_of_page(heading))
    path = ROOT / "docs" / link
    return path.name, path.read_text("utf-8")


def changes(heading):
    """Return [(file, number of the line in the new file, line), ...] that a recipe adds."""
    added = []
    file = ""
    number = 0
    for line in diff(heading)[1].splitlines():
        hunk = re.match(r"@@ -\S+ \+(\d+)", line)
        if line.startswith("+++ b/"):
            file = line.removeprefix("+++ b/")
        elif hunk:
            number = int(hunk[1])
        elif line.startswith("+"):
            added.append((file, number, line[1:]))
            number += 1
        elif not line.startswith("-"):
            number += 1
    return added


def removed_lines(heading):
    """Return the lines that a recipe takes out, of all files."""
    lines = diff(heading)[1].splitlines()
    return [line[1:] for line in lines if line.startswith("-") and not line.startswith("--- a/")]


# -- The limits ------------------------------------------------------------------------------------


def marked_lines(text):
    """Return the numbers of the lines that a user may change: those below a `YOUR CODE` mark."""
    numbers = set()
    mark = None
    for number, line in enumerate(text.splitlines(), start=1):
        found = re.fullmatch("# YOUR CODE: (imports|settings|begin|end)", line)
        if found:
            mark = found[1]
        elif mark in ("imports", "settings") and re.match(r"# -- \d\. ", line):
            mark = None  # the next section
        elif mark in ("imports", "settings", "begin"):
            numbers.add(number)
    return numbers


def check_limits(heading, folder, names=None):
    """Fail if a recipe adds too many lines, or one outside the marks that is not a new name.

    `names` is {name: new name}: elsewhere, an added line has to be a removed one with new names.
    Returns the number of added lines.
    """
    renamed = set()
    for line in removed_lines(heading):
        for old, new in (names or {}).items():
            line = line.replace(old, new)
        renamed.add(line)
    counted = [change for change in changes(heading) if not UNCOUNTED.fullmatch(change[0])]
    for file, number, line in counted:
        text = (folder / file).read_text("utf-8")
        assert text.splitlines()[number - 1] == line, (file, number, line)
        assert number in marked_lines(text) or line in renamed, f"outside the marks: {line}"
    assert 0 < len(counted) <= MAX_ADDED, len(counted)
    said = rf"\b{len(counted)} (added )?lines\b"
    assert re.search(said, part_of_page(heading)), f"the page has to say {len(counted)} lines"
    return len(counted)


def check_style(folder):
    """Fail unless the recipe is formatted and ruff finds nothing in it, such as unused imports."""
    files = ["template_flow.py", "template_ray_serve.py"]
    settings = f"--config={ROOT / 'pyproject.toml'}"
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, settings, "--no-cache", *files]
        done = subprocess.run(ruff, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# -- A folder with the recipe ----------------------------------------------------------------------


def apply(heading, folder):
    """Copy the templates into a new git repository and apply the diff as the page says."""
    for path in template_files():
        shutil.copy(path, folder)
    name, text = diff(heading)
    (folder / name).write_text(text, "utf-8")
    assert f"git apply {name}" in [command for command, _ in commands(heading)]
    for command in (["init", "--quiet"], ["add", "."], ["apply", name]):
        subprocess.run(["git", *command], cwd=folder, env=clean(folder), check=True)
    return folder


def write_data(heading, folder):
    """Run the script of a part of the page that writes the data."""
    (script,) = blocks_in(part_of_page(heading), "python")
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, timeout=400)


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""


def without(folder, packages):
    """Return variables for a process that does not find these packages, as if not installed."""
    site = folder / "without"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(WITHOUT.replace("PACKAGES", repr(set(packages))))
    return {"PYTHONPATH": str(site)}


def run(folder, command, seconds=400, **environment):
    """Run a command line as somebody does who just opened a terminal; (exit code, its output)."""
    return execute(command, folder, {**clean(folder), **environment}, seconds)


def follow(heading, folder, **environment):
    """Run every command of a part of the page, and compare what it prints; return the outputs.

    `serve run` gets a free port, which the commands after it ask. `git apply` is done before, and
    docker is left to `Image`.
    """
    outputs = {}
    with contextlib.ExitStack() as stack:
        port = 8000
        for command, expected in commands(heading):
            if command.startswith(("git ", "docker ", "pip ")):
                continue
            if command.startswith("serve "):
                server = Server(folder, *shlex.split(command)[1:], **environment)
                port = stack.enter_context(server).wait().port
                continue
            here = command.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
            code, output = run(folder, here, **environment)
            assert code == 0 and shows(output, expected), (command, expected, output)
            outputs[command] = output
    return outputs


# -- The flow --------------------------------------------------------------------------------------

FLOW = "python template_flow.py --no-pylint"


def artifacts(folder, step, **environment):
    """Return {name: value} of the newest task of a step, as the user who ran it."""
    return flow_testing.artifacts(folder, step, METAFLOW_USER="reader", **environment)


def changed_files(model, other):
    """Return the files that differ; pytest would need hours to show how their bytes do."""
    assert model.keys() == other.keys()
    return [name for name, content in model.items() if other[name] != content]


def fails_in_one_line(folder, options, message, **environment):
    """Fail unless `run` with these options ends with this message, and without a traceback."""
    code, output = run(folder, f"{FLOW} run {options}", **environment)
    assert code != 0 and message in output and "Traceback" not in output, output


def checkpoints(folder):
    """Return how many checkpoints all runs of the folder have saved."""
    kept = folder / ".metaflow/mf.checkpoints/checkpoints/metadata"
    return len(list(kept.glob("**/*.metadata")))


def kill_in_train(folder, options, saved, **environment):
    """Start a run, and kill -9 its task of `train` when that has saved so many checkpoints."""
    before = checkpoints(folder)
    log = folder / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {FLOW} run {options}"],
            cwd=folder,
            env={**clean(folder), **environment},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while checkpoints(folder) < before + saved:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        (task,) = set(re.findall(r"/train/\S+ \(pid (\d+)\)", log.read_text()))
        os.kill(int(task), signal.SIGKILL)
        assert process.wait(timeout=400) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


# -- The server ------------------------------------------------------------------------------------


def check_example(server, route, known):
    """Fail unless /openapi.json and the page show the first known request, and it is answered."""
    status, described = server.ask(f"{route}/openapi.json", method="GET")
    content = described["paths"]["/"]["post"]["requestBody"]["content"]["application/json"]
    assert status == 200 and content["example"] == known[0]["request"]
    status, page = server.ask(f"{route}/", method="GET")
    assert status == 200 and json.dumps(list(known[0]["request"])[0])[1:-1] in page
    for case in known:
        status, answer = server.ask(route, case["request"])
        assert status == 200 and set(answer) == set(case["answer"]), answer


def check_refused(server, route, body, *problems):
    """Fail unless a request gets 422 and one line that names these problems."""
    status, answer = server.ask(route, body)
    assert status == 422, answer
    message = answer["error"]["message"]
    assert "Send JSON like {" in message and "\n" not in message
    assert all(problem in message for problem in problems), message


def known_answers(folder):
    """Return [{"request": ..., "answer": ...}, ...] of the exported model."""
    return json.loads((folder / "model/known_answers.json").read_text("utf-8"))


# -- The image -------------------------------------------------------------------------------------


def docker_answers():
    return bool(shutil.which("docker")) and pods.docker("version").returncode == 0


@contextlib.contextmanager
def image(folder, tag):
    """Build the image of a folder; yield a container of it, and remove both at the end."""
    build(folder, tag)
    try:
        with Container(image=tag) as running:
            yield running
    finally:
        pods.docker("image", "rm", tag)


# -- The tests that came with the templates --------------------------------------------------------


def run_copied_test(folder, name, **environment):
    """Run a copied test of the mechanics, which passes whatever the task is, without a network."""
    # By default pytest closes its folder to others, in which a test beside this one runs as nobody.
    # Not within the project: Metaflow writes to the first .metaflow that it finds on the way up.
    scratch = f"{folder}-scratch"
    command = f"python -m pytest -q -x -p no:cacheprovider -p no:xdist --basetemp={scratch} {name}"
    if can_cut_network():
        command = WITHOUT_NETWORK + command
    code, output = run(folder, command, seconds=1500, **environment)
    assert code == 0 and " passed" in output, output[-5000:]
