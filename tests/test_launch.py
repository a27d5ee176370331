"""Files for cluster engines: golden files, the engines' own schemas, what is refused, sbatch under a stand-in.

`python tests/test_launch.py` writes the golden files again.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from lora_tune.cli import main
from lora_tune.errors import UsageError
from lora_tune.training.job_files import STORAGE, Engine, Job, file_name, how_to_submit, job_name, render

GOLDEN = Path(__file__).resolve().parent / "golden" / "launch"
ENGINES: tuple[Engine, ...] = ("slurm", "kubeflow", "skypilot", "dstack", "ray")
RECIPE = "base: {name: org/base}\ndata: [{source: org/rows}]\noutput: adapters/Alpaca 7B\n"
SIMPLE = Job("alpaca", "recipes/alpaca.yaml", RECIPE, f"{STORAGE}/alpaca", gpu="H100", image="org/image:1",
             storage="adapters")  # fmt: skip
LARGE = Job("alpaca", "recipes/alpaca.yaml", RECIPE, f"{STORAGE}/alpaca", ("train.epochs=2", "seed=7"), nodes=2,
            cards=8, gpu="H100", image="org/image:1", storage="adapters", seconds=86_400, machines="spot",
            secrets=("HF_TOKEN", "WANDB_API_KEY"))  # fmt: skip
JOBS = {"simple": SIMPLE, "large": LARGE}
CASES = [(engine, kind) for engine in ENGINES for kind in JOBS]
Printed = pytest.CaptureFixture[str]


def golden(engine: Engine, kind: str) -> Path:
    return GOLDEN / kind / file_name(JOBS[kind], engine)


def documents(text: str) -> list[dict[str, Any]]:
    return list(YAML(typ="safe", pure=True).load_all(text))


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_files_are_as_they_were(engine: Engine, kind: str) -> None:
    assert render(JOBS[kind], engine) == golden(engine, kind).read_text(), "see the difference, then write them again"


@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_first_start_and_restart_are_one_command(engine: Engine, kind: str) -> None:
    """Every file holds the whole command once, with --resume, the world and everything that was said."""
    job, text = JOBS[kind], render(JOBS[kind], engine)
    words = ["run", *job.overrides, f"hardware.processes={job.cards}", f"hardware.nodes={job.nodes}", "--resume"]
    if engine == "ray":
        words = [json.dumps(word) for word in words]
    assert all(text.count(word) >= 1 for word in words)
    assert text.count("hardware.nodes=") == 1
    assert all(name in text for name in job.secrets if engine not in ("slurm", "ray"))  # these hand everything on


@pytest.mark.parametrize("kind", JOBS)
def test_the_trainjob_fits_the_models_of_kubeflow(kind: str) -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models")
    config, job = documents(render(JOBS[kind], "kubeflow"))
    kubernetes_validate.validate(config, "1.37", strict=True)
    assert config["data"] == {"recipe.yaml": RECIPE} and config["metadata"] == job["metadata"]
    read = models.TrainerV1alpha1TrainJob.from_dict(job)
    assert json.loads(read.to_json()) == json.loads(json.dumps(job)), "a key that the models do not know is lost"
    assert read.spec.trainer.num_nodes == JOBS[kind].nodes
    assert read.spec.trainer.num_proc_per_node == JOBS[kind].cards


READERS = {
    "skypilot": (
        "skypilot==0.14.1",
        "import sky; t = sky.Task.from_yaml(path); (r,) = t.resources; "
        "print(json.dumps([t.num_nodes, r.accelerators['H100'], r.use_spot]))",
    ),
    "dstack": (
        "dstack==0.22.5",
        "import yaml; from dstack._internal.core.models.configurations import parse_run_configuration as parse; "
        "r = parse(yaml.safe_load(open(path))); "
        "print(json.dumps([r.nodes, r.resources.gpu.count.max, r.spot_policy.value == 'spot']))",
    ),
}


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.skipif("LORA_TUNE_ENGINES_REQUIRED" not in os.environ, reason="installs the engines: make nightly")
@pytest.mark.parametrize("engine", READERS)
def test_the_engines_own_reader_takes_its_file(engine: str, tmp_path: Path) -> None:
    """In an environment of its own, as their dependencies do not go with ours; of the golden files."""
    package, program = READERS[engine]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    for kind, job in JOBS.items():
        command = [python, "-c", f"import json, sys; path = sys.argv[1]; {program}", str(golden(engine, kind))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        found = json.loads(done.stdout.splitlines()[-1])
        assert found == [job.nodes, job.cards, job.machines == "spot"], engine


@pytest.mark.parametrize("kind", JOBS)
def test_the_driver_of_ray_is_python_and_holds_the_job(kind: str) -> None:
    tree = ast.parse(render(JOBS[kind], "ray"))
    (value,) = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JOB"
    ]
    found = ast.literal_eval(value)
    assert found["arguments"] == JOBS[kind].arguments() and found["nodes"] == JOBS[kind].nodes


@pytest.mark.parametrize("kind", JOBS)
def test_the_sbatch_script_is_shell(kind: str) -> None:
    subprocess.run(["bash", "-n", str(golden("slurm", kind))], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(golden("slurm", kind))], check=True)


STAND_IN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for ((n = 0; n < SLURM_NTASKS; n++)); do
  SLURM_STEP_ID=0 SLURM_PROCID=$n SLURM_LOCALID=$n "$@" || exit $?
done
"""
TASK = """#!/bin/bash
echo "$SLURM_PROCID of $SLURM_NTASKS at $MASTER_ADDR:$MASTER_PORT: $*" >> tasks.log
exit "$(cat code)"
"""


@pytest.mark.parametrize(("code", "restarts", "again"), [(0, 0, 0), (138, 0, 1), (143, 19, 1), (138, 20, 0), (4, 0, 0)])
def test_the_sbatch_script_under_a_stand_in_of_srun(tmp_path: Path, code: int, restarts: int, again: int) -> None:
    """Two tasks get what srun sets; a run that was stopped after it saved queues again, a failed one does not."""
    tools = {
        "srun": STAND_IN,
        "python": TASK,
        "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo host7 || echo "$@" >> queue.log\n',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "code").write_text(str(code))
    job = Job("a", "r.yaml", RECIPE, "adapters/a b", cards=2)
    (tmp_path / "job.sh").write_text(render(job, "slurm"))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "10007",
                   "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "host[7-8]"}  # fmt: skip
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code
    tasks = (tmp_path / "tasks.log").read_text().splitlines()
    said = "-m lora_tune run r.yaml hardware.processes=2 hardware.nodes=1 output=adapters/a b --resume"
    assert tasks == [f"{number} of 2 at host7:29507: {said}" for number in range(2 if code == 0 else 1)]
    queue = tmp_path / "queue.log"
    assert (queue.read_text().split() if queue.exists() else []) == ["requeue", "10007"] * again


@pytest.mark.nightly
@pytest.mark.skipif("LORA_TUNE_ENGINES_REQUIRED" not in os.environ, reason="half a minute: make nightly")
def test_two_tasks_of_srun_train_one_adapter(tmp_path: Path, tiny_base: Path, capsys: Printed) -> None:
    rows = [{"instruction": f"Count to {n}.", "output": f"{n}, done."} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.yaml").write_text(
        f"base: {{name: {tiny_base}, quantize: none, compute_dtype: float32}}\ndata: [{{source: rows.jsonl}}]\n"
        "train: {max_steps: 3, batch_size: 4, max_length: 128}\neval: {samples: 0}\noutput: out\n"
    )
    together = (
        STAND_IN.replace('"$@" || exit $?\n', '"$@" & pids+=($!)\n')
        + 'for pid in "${pids[@]}"; do wait "$pid" || exit $?; done\n'
    )
    tools = {"srun": together, "scontrol": "#!/bin/bash\necho 127.0.0.1\n"}
    for name, text in tools.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(render(Job("a", "r.yaml", RECIPE, "out", cards=2), "slurm"))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=environment, check=True, timeout=250)
    assert main(["adapters", "verify", str(tmp_path / "out"), "--base", str(tiny_base)]) == 0


def written(folder: Path, capsys: Printed, *arguments: str, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["launch", *arguments, "--json"]) == code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(
        RECIPE.replace("org/base", "builtin:quickstart") + "train: {batch_size: 8}\n"
    )
    return tmp_path


@pytest.mark.parametrize("engine", ENGINES)
def test_the_verb_writes_the_file_and_says_how_to_start_it(here: Path, capsys: Printed, engine: Engine) -> None:
    given = [
        "--storage",
        "store",
        "--gpu",
        "H100",
        "--image",
        "org/i:1",
        "--nodes",
        "2",
        "--cards",
        "4",
        "--time",
        "90m",
    ]
    answer = written(here, capsys, "recipes/r.yaml", "output=adapters/x", "--on", engine, *given)
    (file,) = answer["files"]
    text = (here / file["path"]).read_text()
    assert file["start"] in text and file["path"] in file["start"]
    assert "recipes/r.yaml" in text or engine == "kubeflow"
    assert (
        str(here) not in text and f"{'/storage' if engine in ('kubeflow', 'skypilot', 'dstack') else 'store'}/x" in text
    )
    assert written(here, capsys, "recipes/r.yaml", "output=adapters/x", "--on", engine, *given) == answer  # once more


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--on", "kubeflow", "--image", "i"], "storage that outlives"),
        (["--on", "kubeflow", "--storage", "s"], "starts an image"),
        (["--on", "skypilot", "--storage", "s"], "by name"),
        (["--on", "ray"], "storage that outlives"),
        (["--on", "compose"], "needs its engine"),
        ([], "needs its engine"),
        (["--on", "slurm", "--cards", "3"], "batch of all processes"),
        (["--on", "slurm", "--time", "soon"], "must be a duration"),
        (["--on", "slurm", "output=/data/x"], "path of this machine"),
        (["--on", "slurm", "data.0.source=/etc"], "outside of this folder"),
        (["--on", "kubeflow", "--storage", "s", "--image", "i", "data.0.source=recipes/"], "local path"),
        (["--on", "slurm", "hardware.strategy=single", "--cards", "2"], "means one process"),
        (["--on", "slurm", "hardware.strategy=fsdp2", "base.quantize=int8", "--cards", "2"], "cannot be divided"),
    ],
)
def test_what_no_engine_could_run_is_refused(here: Path, capsys: Printed, arguments: list[str], reason: str) -> None:
    (here / "recipes" / "rows.jsonl").write_text('{"text": "a"}\n')
    answer = written(here, capsys, "recipes/r.yaml", *arguments, code=2)
    assert reason in " ".join(problem["reason"] for problem in answer["problems"])
    assert [path.name for path in here.iterdir()] == ["recipes"], "nothing is written"


def test_secrets_and_foreign_files_stay(here: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a" * 34
    given = ["recipes/r.yaml", "--on", "dstack", "--storage", "s"]
    answer = written(here, capsys, *given, "--setup", f"pip install x --token {token}", code=1)
    assert "Hugging Face token" in answer["problems"][0]["reason"] and token not in json.dumps(answer)
    monkeypatch.setenv("MY_API_KEY", "do-not-tell-anybody")
    answer = written(here, capsys, *given, "--setup", "echo do-not-tell-anybody", code=1)
    assert "secret of your environment" in answer["problems"][0]["reason"]
    (here / "notes.txt").write_text("mine")
    written(here, capsys, *given, "--output", "notes.txt", code=2)
    assert (here / "notes.txt").read_text() == "mine"
    outside = here.parent / f"{here.name}-r.yaml"
    outside.write_text(RECIPE)
    assert (
        "outside of this folder"
        in written(here, capsys, str(outside), "--on", "slurm", code=2)["problems"][0]["reason"]
    )


@pytest.mark.parametrize(
    ("output", "name"), [("adapters/Alpaca 7B!", "alpaca-7b"), ("7b", "run-7b"), ("a/..", "run"), ("x" * 60, "x" * 40)]
)
def test_names_are_taken_by_all_engines(output: str, name: str) -> None:
    assert job_name(output) == name


def test_engines_that_need_more_say_all_of_it() -> None:
    with pytest.raises(UsageError) as caught:
        render(Job("a", "r.yaml", RECIPE, "/storage/a"), "kubeflow")
    assert len(caught.value.problems) == 2
    assert how_to_submit(LARGE, "skypilot", "f").count("--secret") == 2


def test_adapters_are_served_from_a_shared_folder(
    here: Path, root: Path, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_deploy import check

    from lora_tune.adapter import verify

    answer = written(here, capsys, "--serve", str(root / "adapters" / "example"), code=2)
    assert "must be on the hub" in answer["problems"][0]["reason"]  # the embedded base is in no engine
    real = verify.verify_folder

    def on_the_hub(folder: Path, **rest: Any) -> Any:
        report = real(folder, **rest)
        base = report.subject.manifest.base.model_copy(update={"name": "org/base", "kind": "hub", "revision": "a" * 40})
        report.subject.manifest = report.subject.manifest.model_copy(update={"base": base})
        return report

    monkeypatch.setattr(verify, "verify_folder", on_the_hub)
    answer = written(here, capsys, "--serve", str(root / "adapters" / "example"), "--nodes", "3")
    assert [Path(file["path"]).name for file in answer["files"]] == ["serve.compose.yaml", "serve.kubernetes.yaml"]
    for file, form in zip(answer["files"], ("compose", "kubernetes"), strict=True):
        text = (here / file["path"]).read_text()
        check(text, form)  # type: ignore[arg-type]
        assert "example=/adapters/example" in text and "--enable-lora" in text and "a" * 40 in text
    assert "vllm-2:" in (here / "serve.compose.yaml").read_text()


if __name__ == "__main__":
    for engine, kind in CASES:
        golden(engine, kind).parent.mkdir(parents=True, exist_ok=True)
        golden(engine, kind).write_text(render(JOBS[kind], engine))
        sys.stdout.write(f"{golden(engine, kind)}\n")
