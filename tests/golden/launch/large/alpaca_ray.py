"""ray job submit --working-dir . -- python FILE   (written by lora-tune launch)

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

JOB = {
    "arguments": [
        "run",
        "recipes/alpaca.yaml",
        "train.epochs=2",
        "seed=7",
        "hardware.processes=8",
        "hardware.nodes=2",
        "output=/storage/alpaca",
        "--resume"
    ],
    "nodes": 2,
    "cards": 8,
    "port": 29500,
    "restarts": 20,
    "stopped": [
        138,
        143
    ],
    "saving_s": 300
}


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
