"""A run as a job of a cluster engine: the file that the engine takes, for its first start and every restart alike.

Every file runs one command, `lora-tune run … --resume`, which starts where nothing is there and goes on where there is
a checkpoint; a signal before the end leaves one. Files hold names of secrets, never values, and no local paths.
Sources: SLURM's sbatch and srun pages; Kubeflow Trainer v2.3 (TrainJob v1alpha1, runtime `torch-distributed`);
SkyPilot 0.14 (task YAML, managed jobs); dstack 0.22 (`.dstack.yml` of type task); Ray 2.60 (placement groups).
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from string import Template
from typing import Any, Literal

from lora_tune.errors import Problem, UsageError

Engine = Literal["slurm", "kubeflow", "skypilot", "dstack", "ray"]
STORAGE, RECIPES = "/storage", "/recipe"  # inside containers and machines of an engine
PORT = 29_500  # on which the processes of several machines meet
SAVING_S = 300  # before the end in which a checkpoint is written: a step, and the file
STOPPED = (138, 143)  # exit codes after USR1 and TERM: there is a checkpoint, and more to do
MOST_RESTARTS = 20


@dataclass(frozen=True, slots=True)
class Job:
    """What is to run where. `recipe` is its path from the folder that is sent along, `output` the adapter's folder.

    `cards` are those of each machine. `storage` outlives the machines: a claim (kubeflow), a bucket (skypilot), a
    volume (dstack), a shared folder (slurm, ray). `secrets` are names of environment variables.
    """

    name: str
    recipe: str
    recipe_text: str
    output: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    cards: int = 1
    gpu: str | None = None
    image: str | None = None
    setup: str = "pip install lora_tune"
    storage: str | None = None
    seconds: int | None = None
    machines: Literal["spot", "lasting"] = "lasting"
    secrets: tuple[str, ...] = field(default=())

    def arguments(self, *, recipe: str | None = None) -> list[str]:
        """What stands behind `lora-tune`; the same for the first start and every restart."""
        overrides = [*self.overrides, f"hardware.processes={self.cards}", f"hardware.nodes={self.nodes}"]
        return ["run", recipe or self.recipe, *overrides, f"output={self.output}", "--resume"]


def render(job: Job, engine: Engine) -> str:
    """The file of an engine as text.

    Raises: UsageError where the engine needs something that was not said.
    """
    if missing := [problem for name, problem in _NEEDS[engine].items() if getattr(job, name) is None]:
        raise UsageError([Problem(reason, fix) for reason, fix in missing])
    return _RENDERERS[engine](job)


def file_name(job: Job, engine: Engine) -> str:
    """What the file is called by habit of the engine."""
    endings = {"slurm": ".sbatch", "kubeflow": ".trainjob.yaml", "skypilot": ".sky.yaml", "dstack": ".dstack.yml",
               "ray": "_ray.py"}  # fmt: skip
    return f"{job.name}{endings[engine]}"


def how_to_submit(job: Job, engine: Engine, path: str) -> str:
    """The command that hands the file to its engine."""
    secrets = "".join(f" --secret {name}" for name in job.secrets)
    words = {
        "slurm": f"sbatch {path}",
        "kubeflow": f"kubectl apply -f {path}",
        "skypilot": f"sky jobs launch {path}{secrets}",
        "dstack": f"dstack apply -f {path}",
        "ray": f"ray job submit --working-dir . -- python {path}",
    }
    return words[engine]


# what an engine cannot do without: field of the job, (what is missing, what to do)
_OUTLIVES = "checkpoints need storage that outlives the machines, got none"
_NEEDS: dict[Engine, dict[str, tuple[str, str]]] = {
    "slurm": {},
    "kubeflow": {
        "storage": (_OUTLIVES, "--storage NAME of a PersistentVolumeClaim that all pods can write (ReadWriteMany)"),
        "image": ("kubeflow starts an image, got none", "--image one in which lora_tune is installed"),
    },
    "skypilot": {
        "storage": (_OUTLIVES, "--storage NAME of a bucket"),
        "gpu": ("skypilot looks for cards by name, got none", "--gpu H100 or the like"),
    },
    "dstack": {"storage": (_OUTLIVES, "--storage NAME of a volume")},
    "ray": {"storage": (_OUTLIVES, "--storage FOLDER that all machines see")},
}


def _slurm(job: Job) -> str:
    """An sbatch script: one task a card, USR1 five minutes before the end, and then back into the queue."""
    gpus = f"{job.gpu}:{job.cards}" if job.gpu else str(job.cards)
    lines = [f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={job.cards}",
             f"--gpus-per-node={gpus}", f"--signal=USR1@{SAVING_S}", "--requeue", "--open-mode=append",
             f"--output={job.name}-%j.log"]  # fmt: skip
    lines += [f"--time={_clock(job.seconds)}"] if job.seconds else []
    return Template(_SBATCH).substitute(
        directives="\n".join(f"#SBATCH {line}" for line in lines),
        port=PORT,
        command=_shell(["python", "-m", "lora_tune", *job.arguments()]),
        container=f" --container-image={shlex.quote(job.image)}" if job.image else "",
        saving=SAVING_S,
        stopped="|".join(map(str, STOPPED)),
        restarts=MOST_RESTARTS,
    )


_SBATCH = """\
#!/bin/bash
# sbatch FILE, with the environment active in which lora_tune is installed; written by lora-tune launch.
# $saving s before the time is up every process gets USR1, writes a checkpoint and ends; the job then queues again, and
# the same command goes on. So it does when SLURM preempts the job (PreemptMode=REQUEUE).
$directives
set -u
MASTER_ADDR=$$(scontrol show hostnames "$${SLURM_JOB_NODELIST:-localhost}" | head -n 1)
MASTER_PORT=$$(($port + $${SLURM_JOB_ID:-0} % 10000))
export MASTER_ADDR MASTER_PORT

srun --kill-on-bad-exit=1$container $command
code=$$?
case $$code in
  $stopped)
    if [ "$${SLURM_RESTART_COUNT:-0}" -lt $restarts ]; then scontrol requeue "$$SLURM_JOB_ID"; fi ;;
esac
exit $$code
"""


def _kubeflow(job: Job) -> str:
    """A ConfigMap with the recipe, and a TrainJob that mounts it and the claim; pods get time to save."""
    mounts = [{"name": "storage", "mountPath": STORAGE}, {"name": "recipe", "mountPath": RECIPES, "readOnly": True}]
    volumes = [
        {"name": "storage", "persistentVolumeClaim": {"claimName": job.storage}},
        {"name": "recipe", "configMap": {"name": job.name}},
    ]
    found = "export MASTER_ADDR=$PET_MASTER_ADDR MASTER_PORT=$PET_MASTER_PORT NODE_RANK=$PET_NODE_RANK"
    command = _shell(["lora-tune", *job.arguments(recipe=f"{RECIPES}/recipe.yaml")])
    trainer: dict[str, Any] = {
        "image": job.image,
        "command": ["bash", "-c", f"{found} && cd {STORAGE} && exec {command}"],
        "numNodes": job.nodes,
        "numProcPerNode": job.cards,
        "resourcesPerNode": {"limits": {"nvidia.com/gpu": str(job.cards)}},
    }
    if job.secrets:
        trainer["env"] = [
            {"name": name, "valueFrom": {"secretKeyRef": {"name": "lora-tune", "key": name}}} for name in job.secrets
        ]
    pod = {
        "terminationGracePeriodSeconds": SAVING_S,
        "volumes": volumes,
        "containers": [{"name": "node", "volumeMounts": mounts}],
    }
    if job.gpu:
        pod["nodeSelector"] = {"nvidia.com/gpu.product": job.gpu}
    replicated = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    spec: dict[str, Any] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime",
                       "name": "torch-distributed"},
        "trainer": trainer,
        "runtimePatches": [{
            "manager": "lora-tune.io/launch",
            "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
        }],
    }  # fmt: skip
    if job.seconds:
        spec["activeDeadlineSeconds"] = job.seconds
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": job.name},
         "data": {"recipe.yaml": job.recipe_text}},
        {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": job.name},
         "spec": spec},
    ]  # fmt: skip
    head = [
        "a lost pod is started again by its Job as often as the runtime's backoffLimit says, and the command goes on",
        *([f"its secrets: kubectl create secret generic lora-tune --from-literal={job.secrets[0]}=…"]
          if job.secrets else []),
    ]  # fmt: skip
    return _yaml(documents, how_to_submit(job, "kubeflow", "FILE"), *head)


def _skypilot(job: Job) -> str:
    """A managed job: a machine that is taken away is replaced, and so is a run that saved and ended by a signal."""
    run = 'export MASTER_ADDR=$(echo "$SKYPILOT_NODE_IPS" | head -n 1) NODE_RANK=$SKYPILOT_NODE_RANK\n'
    run += f"export MASTER_PORT={PORT}\nexec {_shell(['lora-tune', *job.arguments()])}\n"
    resources: dict[str, Any] = {
        "accelerators": f"{job.gpu}:{job.cards}",
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": list(STOPPED)},
    }
    if job.machines == "spot":
        resources["use_spot"] = True
    if job.image:
        resources["image_id"] = f"docker:{job.image}"
    content: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": resources,
        "file_mounts": {STORAGE: {"name": job.storage, "mode": "MOUNT_CACHED"}},
        **({} if job.image else {"setup": _literal(f"{job.setup}\n")}),
        "run": _literal(run),
    }
    if job.secrets:
        content["secrets"] = dict.fromkeys(job.secrets)
    return _yaml([content], how_to_submit(job, "skypilot", "FILE"))


def _dstack(job: Job) -> str:
    """A task whose retries go on from the checkpoint on the volume; a stop leaves time to save."""
    found = f"export MASTER_ADDR=$DSTACK_MASTER_NODE_IP MASTER_PORT={PORT} NODE_RANK=$DSTACK_NODE_RANK"
    content: dict[str, Any] = {"type": "task", "name": job.name, "nodes": job.nodes}
    content |= {"image": job.image} if job.image else {"python": "3.12"}
    content |= {
        "files": [f".:{STORAGE}-files"],
        "working_dir": f"{STORAGE}-files",
        "commands": [*([] if job.image else [job.setup]), found, f"exec {_shell(['lora-tune', *job.arguments()])}"],
        "resources": {"gpu": f"{job.gpu}:{job.cards}" if job.gpu else job.cards, "shm_size": "8GB"},
        "volumes": [{"name": job.storage, "path": STORAGE}],
        "retry": {"on_events": ["no-capacity", "interruption"], "duration": "2d"},
        "stop_duration": SAVING_S,
        "spot_policy": "spot" if job.machines == "spot" else "on-demand",
    }
    if job.seconds:
        content["max_duration"] = job.seconds
    if job.secrets:
        content["env"] = list(job.secrets)
    return _yaml([content], how_to_submit(job, "dstack", "FILE"))


def _ray(job: Job) -> str:
    """A driver that places one task on each machine, and starts them again where one was lost."""
    facts = {"arguments": job.arguments(), "nodes": job.nodes, "cards": job.cards, "port": PORT,
             "restarts": MOST_RESTARTS, "stopped": list(STOPPED), "saving_s": SAVING_S}  # fmt: skip
    text = json.dumps(facts, indent=4, ensure_ascii=True)
    return Template(_DRIVER).substitute(submit=how_to_submit(job, "ray", "FILE"), job=text)


_DRIVER = '''\
"""$submit   (written by lora-tune launch)

One task on each machine holds its cards and runs `lora-tune run ... --resume` there. Where a machine is lost, or a run
was stopped by a signal after it saved, all of them start again and go on from the checkpoint.
"""

import os
import signal
import socket
import subprocess
import sys

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

JOB = $job


@ray.remote(max_retries=0)
def address():
    """The machine of rank 0, and a port that is free there."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


@ray.remote(max_retries=0)
def machine(rank, where):
    """The run on one machine; its exit code."""
    found = {"MASTER_ADDR": where[0], "MASTER_PORT": str(where[1]), "NODE_RANK": str(rank)}
    command = [sys.executable, "-m", "lora_tune", *JOB["arguments"]]
    process = subprocess.Popen(command, env={**os.environ, **found})
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # the task is cancelled: time to save
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(JOB["saving_s"])
            except subprocess.TimeoutExpired:
                process.kill()


def once():
    """One start on all machines; the largest exit code, or None where a machine was lost."""
    bundle = {"CPU": 1, "GPU": JOB["cards"]} if JOB["cards"] else {"CPU": 1}
    group = placement_group([bundle] * JOB["nodes"], strategy="STRICT_SPREAD")
    ray.get(group.ready())

    def placed(task, number, cards):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number)
        return task.options(num_cpus=1, num_gpus=cards, scheduling_strategy=strategy)

    try:
        where = ray.get(placed(address, 0, 0).remote())
        runs = [placed(machine, rank, JOB["cards"]).remote(rank, where) for rank in range(JOB["nodes"])]
        return max(ray.get(runs))
    except (ray.exceptions.NodeDiedError, ray.exceptions.WorkerCrashedError, ray.exceptions.RayTaskError) as error:
        print(f"a machine was lost: {error}", file=sys.stderr)
        return None
    finally:
        remove_placement_group(group)


if __name__ == "__main__":
    ray.init(address=os.environ.get("RAY_ADDRESS", "auto"))
    for _ in range(1 + JOB["restarts"]):
        code = once()
        if code is not None and code not in JOB["stopped"]:
            sys.exit(code)
    sys.exit("lora-tune launch: the run was interrupted too often")
'''

_RENDERERS: dict[Engine, Callable[[Job], str]] = {
    "slurm": _slurm,
    "kubeflow": _kubeflow,
    "skypilot": _skypilot,
    "dstack": _dstack,
    "ray": _ray,
}


def job_name(output: str) -> str:
    """A name that all engines take, from the adapter's folder: letters, digits and hyphens, a letter first."""
    plain = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(output).name.lower()).strip("-") or "run"
    return (plain if plain[0].isalpha() else f"run-{plain}")[:40].rstrip("-")


def _shell(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _clock(seconds: int) -> str:
    """SLURM's hours:minutes:seconds."""
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _literal(text: str) -> Any:
    from ruamel.yaml.scalarstring import LiteralScalarString

    return LiteralScalarString(text)


def _yaml(documents: Sequence[dict[str, Any]], submit: str, *more: str) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.scalarstring import walk_tree

    yaml, out = YAML(), io.StringIO()
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    for document in documents:
        walk_tree(document)  # texts of several lines as such
    yaml.dump_all(documents, out)
    head = [f"# {submit}; written by lora-tune launch, checked against the schema, not run by it.",
            *(f"# {line}" for line in more)]  # fmt: skip
    return "\n".join([*head, out.getvalue()])
