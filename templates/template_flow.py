# template_flow.py, version 0.1.0
"""Train a small English-to-French translator with Metaflow and track it with Weights & Biases.

    python template_flow.py run --offline True        no account, no key, no network
    python template_flow.py run --offline False       tracked: needs WANDB_API_KEY and WANDB_PROJECT

One unedited file for a laptop and for a cluster: the steps run where Metaflow is configured to run them
(`outerbounds configure ...`), and here when it is not. `# YOUR CODE:` marks where your own work goes.
"""

import contextlib
import hashlib
import importlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from metaflow import Checkpoint, Config, FlowMutator, FlowSpec, Parameter, Step, card, checkpoint, current, kubernetes
from metaflow import nvidia, pypi, requirements_txt_parser, retry, schedule, secrets, step
from metaflow.cards import Markdown, Table, VegaChart
from metaflow.exception import MetaflowException
from metaflow.metaflow_config import DEFAULT_DATASTORE, DEFAULT_ENVIRONMENT

IMAGE = None  # YOUR CODE: "registry/name@sha256:...", built from Dockerfile; None: @pypi brings the packages
SECRETS: list[str] = []  # YOUR CODE: names of secrets with WANDB_API_KEY, as ["outerbounds.wandb"]; never a key
CRON = None  # YOUR CODE: when a deployed flow starts by itself, such as "0 6 * * 1"; None: never
SCHEDULED = "argo-workflows" in sys.argv or "ARGO_WORKFLOW_NAME" in os.environ
ON_CPU = kubernetes(image=IMAGE, cpu=2, memory=8_000, disk=10_000)  # memory and disk in MB
# YOUR CODE: the GPU of `train`. @nvidia is for runs started by hand only, so a schedule takes one of the cluster
ON_GPU = kubernetes(image=IMAGE, gpu=1, memory=16_000, disk=20_000) if SCHEDULED else nvidia(gpu=1, gpu_type="L40S")
REQUIREMENTS = "".join(file.read_text() for file in Path(__file__).parent.glob("requirements.outerbounds.txt"))
PREFIX = "translate English to French: "  # YOUR CODE: how T5 knows its task; the server has to have the same
BATCH, MAX_TOKENS = 64, 128  # texts at once; longer texts are cut here, never where the model is served
TENSORS = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": MAX_TOKENS}


class Stop(MetaflowException):
    """A mistake that the user can mend: shown as one line, without a traceback."""


class Placement(FlowMutator):
    """Drops what only a cluster understands while Metaflow is local; elsewhere refuses what cannot work, at once."""
    def pre_mutate(self, mutable_flow):
        environment = (re.findall(r"--environment[= ](\S+)", " ".join(sys.argv)) or [DEFAULT_ENVIRONMENT])[0]
        needed = set(dict(mutable_flow.configs)["requirements"]["packages"])
        for name, each in mutable_flow.steps:
            for decorator in ("kubernetes", "nvidia", "pypi", "conda", "secrets", "retry"):
                if DEFAULT_DATASTORE == "local" or (decorator == "pypi" and IMAGE and each.has_decorator("kubernetes")):
                    each.remove_decorator(decorator)
            on = {decorator: arguments for decorator, _, _, arguments in each.decorator_specs}
            listed = {**on.get("conda", {}), **on.get("pypi", {})}.get("packages", {})
            lacks = sorted(needed - set(listed() if callable(listed) else listed))  # a call gives a Config's value
            for wrong, line in (
                ("nvidia" in on and SCHEDULED, "@nvidia cannot be scheduled; use @kubernetes(gpu=1, memory=16_000)"),
                ("nvidia" in on and lacks, f"@nvidia has what @pypi lists, add: {lacks}"),
                (environment in ("pypi", "conda") and on.get("kubernetes", {}).get("image"),
                 f"--environment={environment} hides the packages of the image; drop image= or --environment"),
            ):
                if wrong:
                    raise Stop(f"step {name}: {line}")


def require_wandb():
    """Read `.env` where there is one; Stop when W&B needs what the environment does not have."""
    importlib.import_module("dotenv").load_dotenv()  # a variable that is set wins
    missing = [name for name in ("WANDB_API_KEY", "WANDB_PROJECT") if not os.environ.get(name)]
    if missing and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise Stop(f"--offline False needs {' and '.join(missing)}, before the command or in .env; or --offline True")


@contextlib.contextmanager
def tracked(offline, **config):
    """Yield one W&B run in every mode, so that logging needs no `if`; trouble with W&B never ends the training."""
    os.environ.update({"WANDB_MODE": "offline"} if offline else {}, WANDB_ERROR_REPORTING="false")
    import wandb  # set before: no request at all when offline, and no 20 s of reports to a server out of reach
    if not offline:
        require_wandb()
    path = [current.flow_name, current.run_id, current.step_name]
    options = dict(id="-".join([*path, current.task_id]), name="/".join(path[1:]), group="/".join(path[:2]), tags=path,
                   resume="allow", config={**config, "run": path[1], "resumed_from": current.origin_run_id},
                   settings=wandb.Settings(init_timeout=15, finish_timeout=15, console="off", silent=True))
    try:
        run = wandb.init(**options)
    except wandb.Error as error:
        print(f"W&B is out of reach, going on offline: {' '.join(str(error).split())}")
        wandb.teardown()  # the next init would meet what is left of this one, and its mode
        os.environ["WANDB_MODE"] = "offline"
        run = wandb.init(**options)
    print("W&B mode:", "disabled" if run.disabled else "offline" if run.offline else f"online, {run.url}")
    try:
        yield run
    finally:
        run.finish(exit_code=int(any(sys.exc_info())))  # 1 where the lines in the `with` failed
        if not run.disabled:
            print("To send W&B what it lacks: wandb sync", run.sync_dir, "" if run.offline else "--include-online")


# YOUR CODE: read and check your own data
def read_pairs(path):
    """Return [(source, target), ...] from a UTF-8 TSV file with the header source<TAB>target; Stop names the line."""
    try:
        rows = [line.split("\t") for line in Path(path).read_text("utf-8-sig").rstrip("\n").split("\n")]
    except OSError as error:
        raise Stop(f"{path}: {error.strerror}; --data takes a TSV file") from None
    except UnicodeDecodeError as error:
        raise Stop(f"{path} line {error.object.count(10, 0, error.start) + 1}: not UTF-8; save it as UTF-8") from None
    if rows[0] != ["source", "target"]:
        raise Stop(f"{path} line 1: the header has to be source<TAB>target")
    for number, cells in enumerate(rows, 1):
        if len(cells) != 2 or any(cell.strip().lower() in ("", "nan") for cell in cells):
            raise Stop(f"{path} line {number}: needs two texts separated by one tab, neither empty nor NaN")
    return [(source, target) for source, target in rows[1:]]


def demo_pairs():
    """Return a small language of greetings and simple sentences, [(English, French), ...], always the same."""
    greetings = {"Hello": "Bonjour", "Good morning": "Bonjour", "Welcome": "Bienvenue", "Thanks": "Merci"}
    people = {"": "", " world": " le monde", " my friend": " mon ami", " my love": " mon amour", " sir": " monsieur",
              " madam": " madame", " everyone": " tout le monde", " children": " les enfants", " doctor": " docteur",
              " neighbour": " voisin", " ladies": " mesdames", " gentlemen": " messieurs", " teacher": " professeur"}
    subjects = {"The cat": "Le chat", "The queen": "La reine", "My sister": "Ma sœur", "A child": "Un enfant"}
    verbs = {"sees": "voit", "wants": "veut", "likes": "aime", "buys": "achète", "paints": "peint"}
    nouns = {"house": "maison", "car": "voiture", "door": "porte", "table": "table", "flower": "fleur"}
    adjectives = {"small ": "petite {}", "big ": "grande {}", "beautiful ": "belle {}", "": "{}", "red ": "{} rouge",
                  "green ": "{} verte", "black ": "{} noire", "wonderful ": "{} merveilleuse"}
    things = {f"{the} {adjective}{noun}": f"{la} {french.format(nouns[noun])}" for noun in nouns
              for adjective, french in adjectives.items() for the, la in (("the", "la"), ("a", "une"))}
    return [(hello + who + end, greetings[hello] + people[who] + fin) for hello in greetings for who in people
            for end, fin in (("!", " !"), (".", "."), ("", ""))] + [
        (f"{who} {does} {what}.", f"{subjects[who]} {verbs[does]} {things[what]}.")
        for who in subjects for does in verbs for what in things]


def split(pairs):
    """Return (training, held-out) pairs, about 9:1, by the letters and digits of the source alone: none in both."""
    keys = [re.sub(r"\W+", " ", source.casefold()).strip() or source for source, _ in pairs]
    numbers = [int(hashlib.sha256(key.encode()).hexdigest(), 16) for key in keys]
    held_out = {n for n in numbers if n % 10 == 9} or set(numbers[-1:])
    if len(set(numbers)) <= len(held_out):
        raise Stop(f"{len(pairs)} pairs are too few to train on some and hold out others; add more")
    return [[pair for pair, n in zip(pairs, numbers) if (n in held_out) == side] for side in (False, True)]


def load_model(place):
    """Return (model, tokenizer) from a transformers folder or the hub."""
    hf = importlib.import_module("transformers")  # a plain import costs Metaflow's lint more than a minute
    try:
        return hf.AutoModelForSeq2SeqLM.from_pretrained(place), hf.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise Stop(f"no model at {place}: {str(error).strip().splitlines()[0]}") from None


# YOUR CODE: build your own model, with its own vocabulary
def new_model(pairs):
    """Return (model, tokenizer), a T5 of 0.3 million parameters and a byte-level BPE of 1000 tokens at most."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    hf, byte_level = importlib.import_module("transformers"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = byte_level, decoders.ByteLevel()
    bpe.train_from_iterator((text for s, t in pairs for text in (PREFIX + s, t)), trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "</s>"], initial_alphabet=byte_level.alphabet(), show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return hf.T5ForConditionalGeneration(hf.T5Config(
        vocab_size=bpe.get_vocab_size(), d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0)), hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"])


# YOUR CODE: train your own model
def fit(model, tokenizer, pairs, checkpoints, seconds, **arguments):
    """Train `model` in place, on from the checkpoint in the directory if there is one, and return what was logged."""
    hf, begin = importlib.import_module("transformers"), time.monotonic()
    class Watch(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= 0 < seconds < time.monotonic() - begin
        def on_save(self, args, state, control, **_):
            checkpoints.save()
    def collate(rows):
        labels = tokenizer([target for _, target in rows], **TENSORS).input_ids
        return {**tokenizer([PREFIX + source for source, _ in rows], **TENSORS),
                "labels": labels.masked_fill(labels == tokenizer.pad_token_id, -100)}  # -100: not in the loss
    trainer = hf.Trainer(model, hf.TrainingArguments(  # picks CUDA, MPS or CPU by itself
        checkpoints.directory, per_device_train_batch_size=BATCH, warmup_steps=20, logging_steps=0.04,
        save_steps=0.1, save_total_limit=1, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        report_to=["wandb"], **arguments), train_dataset=pairs, data_collator=collate, callbacks=[Watch])
    trainer.train(resume_from_checkpoint=any(Path(checkpoints.directory).glob("checkpoint-*")))
    return trainer.state.log_history


def translate(model, tokenizer, texts):
    """Return the greedy translation of each text."""
    outputs = []
    for at in range(0, len(texts), BATCH):
        inputs = tokenizer([PREFIX + text for text in texts[at:at + BATCH]], **TENSORS).to(model.device)
        ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, num_beams=1, do_sample=False)
        outputs += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return outputs


@schedule(cron=CRON, daily=False)
@Placement()
class TemplateFlow(FlowSpec):
    """Sentence pairs in, a translator and its scores out."""
    offline = Parameter("offline", type=bool, default=True, help="True: no key, no network. False: tracked by W&B")
    data = Parameter("data", default="", help="TSV file with the header source<TAB>target; none: a small demo")
    base_model = Parameter("base-model", default="", help="model to fine-tune, such as google-t5/t5-small; none: new")
    epochs = Parameter("epochs", type=int, default=14, help="passes over the training pairs")
    seconds = Parameter("seconds", type=float, default=0, help="stop the training after so many seconds; 0: never")
    seed = Parameter("seed", type=int, default=0, help="same seed, same data: same model")
    min_chrf = Parameter("min-chrf", type=float, default=0, help="fail below this chrF (0 to 100) on held-out pairs")
    requirements = Config("requirements", parser=requirements_txt_parser, default_value=REQUIREMENTS)  # for @pypi

    @step
    def start(self):
        """Check what can be checked before any work, and read the pairs."""
        if self.epochs < 1 or self.seconds < 0 or self.seed < 0:
            raise Stop("--epochs has to be 1 or more, --seconds and --seed 0 or more")
        if not self.offline and DEFAULT_DATASTORE == "local":  # on a cluster only the tracked steps have the key
            require_wandb()
        self.pairs = read_pairs(self.data) if self.data else demo_pairs()
        self.next(self.prepare)

    @ON_CPU
    @step
    def prepare(self):
        """Hold pairs out for the evaluation."""
        self.training, self.held_out = split(self.pairs)
        print(f"{len(self.training)} pairs to train on, {len(self.held_out)} held out")
        self.next(self.train)

    @retry(times=2)
    @checkpoint(show_card=False)
    @card(type="blank")
    @secrets(sources=SECRETS)
    @ON_GPU
    @pypi(python="3.11", packages=requirements.packages)
    @step
    def train(self):
        """Train; after a crash, `@retry` and `resume` go on from the last checkpoint."""
        importlib.import_module("transformers").set_seed(self.seed)
        model, tokenizer = load_model(self.base_model) if self.base_model else new_model(self.training)
        origin = Step(f"{current.flow_name}/{current.origin_run_id}/train") if current.origin_run_id else []
        mine = os.environ["METAFLOW_CHECKPOINT_TASK_IDENTIFIER"]  # with `foreach`, each task has another one
        for saved in [each for task in origin for each in Checkpoint().list(task=task)[:1] if mine in each["key"]]:
            Checkpoint().load(saved, current.checkpoint.directory)
        with tracked(self.offline, pairs=len(self.training)) as run:
            log = fit(model, tokenizer, self.training, current.checkpoint, self.seconds, seed=self.seed,
                      num_train_epochs=self.epochs, learning_rate=3e-4 if self.base_model else 5e-3)
            current.card.append(Markdown(f"# Run {current.run_id}\nW&B: {'offline' if run.offline else run.url}"))
            # YOUR CODE: log your own numbers: run.log({"name": 1.0})
        self.losses = [{"step": line["step"], "loss": float(line["loss"])} for line in log if "loss" in line]
        axes = {axis: {"field": name, "type": "quantitative"} for axis, name in {"x": "step", "y": "loss"}.items()}
        current.card.append(VegaChart({"data": {"values": self.losses}, "mark": "line", "encoding": axes}))
        tokenizer("")  # forgets padding and truncation, which would be saved too
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.model = {file.name: file.read_bytes() for file in Path(folder).iterdir()}  # read without torch
        self.next(self.evaluate)

    @card(type="blank")
    @secrets(sources=SECRETS)
    @ON_CPU
    @pypi(python="3.11", packages=requirements.packages)
    @step
    def evaluate(self):
        """Score the model on pairs it has never seen."""
        from sacrebleu.metrics import CHRF
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.model.items():
                Path(folder, name).write_bytes(content)
            model, tokenizer = load_model(folder)
        sources, targets = zip(*self.held_out[::1 + len(self.held_out) // 1000])  # a thousand tell enough
        rows = list(zip(sources, targets, translate(model, tokenizer, sources)))
        right = [(source, target) for source, target, output in rows if output == target]
        self.known_answers = dict(right[::1 + len(right) // 5])  # tried again where the model is served
        self.scores = {"held_out_pairs": len(rows), "exact_match": 100 * len(right) / len(rows),  # YOUR CODE: yours too
                       "chrf": CHRF().corpus_score([row[2] for row in rows], [targets]).score,
                       "chrf_of_copying": CHRF().corpus_score(sources, [targets]).score}
        current.card.append(Table([[str(round(n, 1)) for n in self.scores.values()]], headers=list(self.scores)))
        current.card.append(Table([[text[:90] for text in row] for row in rows[:50]], ["source", "target", "output"]))
        with tracked(self.offline) as run:
            run.summary.update(self.scores)
        if self.scores["chrf"] <= max(self.min_chrf, self.scores["chrf_of_copying"]):
            raise Stop(f"not good enough: {self.scores} against --min-chrf {self.min_chrf}")
        self.next(self.end)

    @step
    def end(self):
        """Say what came out and what comes next."""
        print("held-out scores:", ", ".join(f"{name} {round(score, 1)}" for name, score in self.scores.items()))
        print('next: python export_model.py && serve run template_ray_serve:translator_app --route-prefix "/translate"')


if __name__ == "__main__":
    TemplateFlow()
