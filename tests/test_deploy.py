"""The deployment of many replicas: both renderings fit their schemas, say the same, and give away nothing."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from lora_tune.adapter.engine_arguments import Served, vllm_arguments
from lora_tune.errors import LoraTuneError
from lora_tune.serving.deploy import ADAPTERS, Form, VllmDeployment, render_vllm_deployment

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = VllmDeployment(
    Served(
        "Qwen/Qwen2.5-7B",
        "Qwen/Qwen2.5-7B",
        {name: f"{ADAPTERS}/{name}" for name in ("alpaca", "support")},
        rank=16,
        revision="d149729398750b98c0af14eb82c78cfe92750796",
        tokenizer=f"{ADAPTERS}/alpaca",
        dtype="bfloat16",
    )
)
FORMS: tuple[Form, ...] = ("compose", "kubernetes")
COMPOSE = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
NAMES = st.from_regex(r"\A[a-z0-9][a-z0-9_-]{0,20}\Z")


def documents(text: str) -> list[dict[str, Any]]:
    """The YAML documents of a rendering, read by another reader than the writer's settings."""
    return list(YAML(typ="safe", pure=True).load_all(text))


def check(text: str, form: Form) -> None:
    """Raise where a document does not fit its schema; unknown keys count."""
    found = documents(text)
    if form == "compose":
        jsonschema.Draft202012Validator(COMPOSE).validate(found[0])
        return
    for document in found:
        kubernetes_validate.validate(document, "1.37", strict=True)


def parts(deployment: VllmDeployment, kind: str) -> list[dict[str, Any]]:
    return [one for one in documents(render_vllm_deployment(deployment)) if one["kind"] == kind]


@pytest.mark.parametrize("form", FORMS)
def test_the_shipped_files_are_what_is_rendered(form: Form) -> None:
    text = (ROOT / "recipes" / "serve" / f"{form}.yaml").read_text(encoding="utf-8")
    check(text, form)
    assert text == render_vllm_deployment(EXAMPLE, to=form), "run: python docs/serving_files.py"


@pytest.mark.parametrize("form", FORMS)
def test_the_schemas_do_refuse(form: Form) -> None:
    """A misspelt key fails: the checks above can fail."""
    text = render_vllm_deployment(EXAMPLE, to=form)
    misspelt = text.replace("restart:", "restrat:") if form == "compose" else text.replace("replicas:", "replicsa:")
    assert misspelt != text
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(misspelt, form)


@settings(max_examples=12)
@given(
    st.lists(NAMES, min_size=1, max_size=4, unique=True),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 512),
    st.sampled_from(FORMS),
)
def test_every_deployment_fits_its_schema_and_every_replica_serves_all(
    names: list[str], replicas: int, gpus: int, rank: int, form: Form
) -> None:
    served = Served("org/base", "org/base", {name: f"{ADAPTERS}/{name}" for name in names}, rank=rank)
    deployment = VllmDeployment(served, replicas=replicas, gpus=gpus)
    text = render_vllm_deployment(deployment, to=form)
    check(text, form)
    found = documents(text)
    if form == "compose":
        workers = [one for name, one in found[0]["services"].items() if name != "router"]
        commands = [one["entrypoint"] for one in workers]
        reserved = [one["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] for one in workers]
        assert sorted(device for devices in reserved for device in devices) == sorted(
            map(str, range(replicas * gpus))
        )  # each GPU once
        assert found[0]["services"]["router"]["entrypoint"][-replicas:] == [
            f"http://{name}:8000" for name in found[0]["services"] if name != "router"
        ]
    else:
        worker, _ = (one for one in found if one["kind"] == "Deployment")
        container = worker["spec"]["template"]["spec"]["containers"][0]
        assert worker["spec"]["replicas"] == replicas and container["resources"]["limits"]["nvidia.com/gpu"] == gpus
        commands = [container["command"]]
    for command in commands:
        assert command[:2] == ["vllm", "serve"] and all(f"{name}={ADAPTERS}/{name}" in command for name in names)
        assert ("--tensor-parallel-size" in command) == (gpus > 1)


def test_nothing_in_the_cluster_runs_as_root_or_may_write() -> None:
    for one in parts(EXAMPLE, "Deployment"):
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"readinessProbe", "livenessProbe"} <= set(container)
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts.get("adapters", {"readOnly": True})["readOnly"]
            assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_labels_lead_from_service_to_router_and_from_router_to_replicas() -> None:
    worker, router = parts(EXAMPLE, "Deployment")
    (service,), (policy,) = parts(EXAMPLE, "Service"), parts(EXAMPLE, "NetworkPolicy")
    labels = {one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in (worker, router)}
    names = list(labels)
    assert service["spec"]["selector"] == labels[names[1]] == router["spec"]["selector"]["matchLabels"]
    assert policy["spec"]["podSelector"]["matchLabels"] == labels[names[0]]
    command = router["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"app={labels[names[0]]['app']}" in command
    (binding,) = parts(EXAMPLE, "RoleBinding")
    assert binding["subjects"][0]["namespace"] == EXAMPLE.namespace  # the schema does not ask for it, the server does
    (claim,) = parts(EXAMPLE, "PersistentVolumeClaim")
    volume = worker["spec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]
    assert volume == {"claimName": claim["metadata"]["name"], "readOnly": True}


@pytest.mark.parametrize("form", FORMS)
def test_the_key_stands_in_no_file(form: Form) -> None:
    text = render_vllm_deployment(EXAMPLE, to=form)
    where = "VLLM_API_KEY: ${VLLM_API_KEY:?" if form == "compose" else "secretKeyRef:"
    assert where in text and "--api-key" not in text


@pytest.mark.parametrize(
    "changed",
    [
        VllmDeployment(EXAMPLE.served, replicas=0),
        VllmDeployment(EXAMPLE.served, gpus=0),
        VllmDeployment(Served("/models/base", "base")),
        VllmDeployment(Served("builtin:quickstart", "base")),
        VllmDeployment(Served("org/base", "base", {"a": "/adapters/a"}, rank=513)),
    ],
)
def test_what_cannot_be_deployed_is_refused(changed: VllmDeployment) -> None:
    for form in FORMS:
        with pytest.raises(LoraTuneError):
            render_vllm_deployment(changed, to=form)


@given(st.integers(1, 512))
def test_vllm_gets_the_smallest_rank_that_it_takes(rank: int) -> None:
    words = vllm_arguments(Served("b", "b", {"a": "a"}, rank=rank), host="127.0.0.1", port=1)
    taken = int(words[words.index("--max-lora-rank") + 1])
    allowed = (1, 8, 16, 32, 64, 128, 256, 320, 512)
    assert taken in allowed and taken >= rank and not any(rank <= other < taken for other in allowed)
