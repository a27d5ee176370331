"""Many replicas of vLLM behind vLLM's own router, over one shared read-only folder of adapters. Cold.

Two renderings of one deployment: a compose file for one machine with several GPUs, and a Kubernetes manifest. Every
replica holds the base and all adapters, so that any of them answers any request; the router (vllm-project/router)
sends requests that begin alike to the same replica, whose prefix cache then holds their beginning.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_tune.adapter.engine_arguments import Served, vllm_arguments
from lora_tune.errors import UsageError

Form = Literal["compose", "kubernetes"]
VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
ROUTER_IMAGE = "vllm/vllm-router:nightly-20260710-b93cbcb"
ADAPTERS = "/adapters"  # inside the containers
_CACHE, _PORT, _METRICS = "/cache", 8000, 29000
_USER = 2000  # no root in the containers; a number, so that Kubernetes can check it


@dataclass(frozen=True, slots=True)
class VllmDeployment:
    """What is deployed. Adapter folders lie in `folder` (compose: on the machine) or in the claim of that name.

    `served` holds paths inside the containers: adapters and tokenizer below `ADAPTERS`, the base as its hub id.
    """

    served: Served
    name: str = "lora-tune"
    namespace: str = "default"
    replicas: int = 2
    gpus: int = 1
    """Of each replica; more than one share the base's weights (`--tensor-parallel-size`)."""
    folder: str = "./adapters"
    images: Mapping[str, str] = field(default_factory=lambda: {"vllm": VLLM_IMAGE, "router": ROUTER_IMAGE})
    cache: str = "60Gi"
    """Room for the base's weights of each replica (Kubernetes)."""


def render_vllm_deployment(deployment: VllmDeployment, *, to: Form = "kubernetes") -> str:
    """The compose file or the manifest as YAML text.

    Raises: UsageError for a base that is a folder of this machine, or numbers below 1; CheckFailed for a rank that
    vLLM does not take.
    """
    if deployment.replicas < 1 or deployment.gpus < 1:
        got = f"{deployment.replicas} replicas with {deployment.gpus} GPUs"
        raise UsageError(f"a deployment needs replicas and GPUs, got {got}", "give at least 1 of both")
    if deployment.served.base.startswith(("builtin:", ".", "/")):
        reason = f"its base must be on the hub or below {ADAPTERS}, got {deployment.served.base!r}"
        if not deployment.served.base.startswith(f"{ADAPTERS}/"):
            raise UsageError(reason, "merge the adapter, or push its base")
    documents = [_compose(deployment)] if to == "compose" else _manifest(deployment)
    return f"{_header(to)}{_yaml(documents)}"


def _header(to: Form) -> str:
    run = "VLLM_API_KEY=... docker compose up" if to == "compose" else "kubectl apply -f FILE"
    return (
        f"# {run}; written by lora_tune, see docs/serving_many.md. Checked against the schema, not run on a cluster.\n"
    )


def _yaml(documents: list[dict[str, Any]]) -> str:
    from ruamel.yaml import YAML

    yaml, out = YAML(), io.StringIO()
    yaml.width = 4096
    yaml.representer.ignore_aliases = lambda *_: True  # a value that stands twice is written twice
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump_all(documents, out)
    return out.getvalue()


def _command(deployment: VllmDeployment) -> list[str]:
    """The command of a replica, the same in both renderings."""
    parallel = ["--tensor-parallel-size", str(deployment.gpus)] if deployment.gpus > 1 else []
    return ["vllm", "serve", *vllm_arguments(deployment.served, host="0.0.0.0", port=_PORT), *parallel]


def _router(*found: str) -> list[str]:
    """The router's command; health every 10 s instead of 60, so that a lost replica is left alone soon."""
    words = ["vllm-router", "--host", "0.0.0.0", "--port", str(_PORT), "--policy", "cache_aware"]
    words += ["--health-check-interval-secs", "10", "--max-payload-size", str(8 << 20)]
    return [*words, "--prometheus-host", "0.0.0.0", "--prometheus-port", str(_METRICS), *found]


def _caches() -> dict[str, str]:
    """Where vLLM may write: one folder, because the rest of the container is read-only."""
    folders = {"HF_HOME": "hub", "VLLM_CACHE_ROOT": "vllm", "TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg"}
    named = {name: f"{_CACHE}/{folder}" for name, folder in folders.items()}
    return {**named, "HOME": _CACHE, "USER": "vllm", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def _compose(deployment: VllmDeployment) -> dict[str, Any]:
    """Services `vllm-0` … and `router`; only the router has a port, on this machine alone."""
    lock = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
    healthy = f"import urllib.request as u; u.urlopen('http://127.0.0.1:{_PORT}/health', timeout=4)"
    services: dict[str, Any] = {}
    for number in range(deployment.replicas):
        devices = [str(number * deployment.gpus + one) for one in range(deployment.gpus)]
        services[f"vllm-{number}"] = {
            "image": deployment.images["vllm"],
            "entrypoint": _command(deployment),
            "environment": {**_caches(), "VLLM_API_KEY": "${VLLM_API_KEY:?a key for all requests}"},
            "volumes": [f"{deployment.folder}:{ADAPTERS}:ro", f"cache-{number}:{_CACHE}"],
            "tmpfs": ["/tmp"],
            "shm_size": "2gb",
            "expose": [str(_PORT)],
            "restart": "unless-stopped",
            "stop_grace_period": "2m",
            "deploy": {
                "resources": {
                    "reservations": {"devices": [{"driver": "nvidia", "device_ids": devices, "capabilities": ["gpu"]}]}
                }
            },
            "healthcheck": {
                "test": ["CMD", "python3", "-c", healthy],
                "interval": "10s",
                "timeout": "5s",
                "retries": 3,
                "start_period": "20m",
            },
            **lock,
        }
    urls = [f"http://{name}:{_PORT}" for name in services]
    services["router"] = {
        "image": deployment.images["router"],
        "entrypoint": _router("--worker-urls", *urls),
        "ports": [f"127.0.0.1:{_PORT}:{_PORT}"],
        "tmpfs": ["/tmp"],
        "user": f"{_USER}:{_USER}",
        "restart": "unless-stopped",
        "depends_on": {name: {"condition": "service_healthy"} for name in list(services)},
        **lock,
    }
    volumes: dict[str, Any] = {f"cache-{number}": {} for number in range(deployment.replicas)}
    return {"name": deployment.name, "services": services, "volumes": volumes}


def _manifest(deployment: VllmDeployment) -> list[dict[str, Any]]:
    """The objects in the order in which they are needed."""
    worker, router = f"{deployment.name}-vllm", f"{deployment.name}-router"
    rbac = "rbac.authorization.k8s.io"
    sees_pods = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    bound = {
        "subjects": [{"kind": "ServiceAccount", "name": router, "namespace": deployment.namespace}],
        "roleRef": {"kind": "Role", "name": router, "apiGroup": rbac},
    }
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    service = {"type": "ClusterIP", "selector": {"app": router}, "ports": ports}
    only_the_router = {
        "podSelector": {"matchLabels": {"app": worker}},
        "policyTypes": ["Ingress"],
        "ingress": [
            {
                "from": [{"podSelector": {"matchLabels": {"app": router}}}],
                "ports": [{"protocol": "TCP", "port": _PORT}],
            }
        ],
    }
    one_at_a_time = {"maxUnavailable": 1, "selector": {"matchLabels": {"app": worker}}}
    objects = [
        _claim(deployment),
        _object("v1", "ServiceAccount", router),
        _object(f"{rbac}/v1", "Role", router, {"rules": [sees_pods]}),
        _object(f"{rbac}/v1", "RoleBinding", router, bound),
        _deployment(worker, deployment.replicas, _worker_pod(deployment)),
        _deployment(router, 1, _router_pod(deployment, worker, router)),
        _object("v1", "Service", router, {"spec": service}),
        _object("policy/v1", "PodDisruptionBudget", worker, {"spec": one_at_a_time}),
        _object("networking.k8s.io/v1", "NetworkPolicy", worker, {"spec": only_the_router}),
    ]
    for one in objects:
        one["metadata"]["namespace"] = deployment.namespace
    return objects


def _object(version: str, kind: str, name: str, parts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": {"app": name}}, **(parts or {})}


def _claim(deployment: VllmDeployment) -> dict[str, Any]:
    """The shared folder of adapters: written by whoever publishes, read by all replicas."""
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "10Gi"}}}
    return _object("v1", "PersistentVolumeClaim", f"{deployment.name}-adapters", {"spec": spec})


def _deployment(name: str, replicas: int, pod: dict[str, Any]) -> dict[str, Any]:
    """No surge: a further replica would wait for a GPU that nobody gives back."""
    spec = {
        "replicas": replicas,
        "selector": {"matchLabels": {"app": name}},
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": pod},
    }
    return _object("apps/v1", "Deployment", name, {"spec": spec})


def _pod_security() -> dict[str, Any]:
    ids = {"runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER}
    return {"runAsNonRoot": True, **ids, "seccompProfile": {"type": "RuntimeDefault"}}


def _container_security() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


def _probe(*, every_s: int, failures: int) -> dict[str, Any]:
    request = {"path": "/health", "port": "http"}
    return {"httpGet": request, "periodSeconds": every_s, "timeoutSeconds": 5, "failureThreshold": failures}


def _worker_pod(deployment: VllmDeployment) -> dict[str, Any]:
    """One replica of vLLM; it has an hour to fetch and load its base."""
    key = {"secretKeyRef": {"name": f"{deployment.name}-key", "key": "api-key"}}
    environment = [{"name": name, "value": value} for name, value in _caches().items()]
    container = {
        "name": "vllm",
        "image": deployment.images["vllm"],
        "command": _command(deployment),
        "env": [*environment, {"name": "VLLM_API_KEY", "valueFrom": key}],
        "ports": [{"name": "http", "containerPort": _PORT}],
        "resources": {
            "requests": {"cpu": "4", "memory": "16Gi"},
            "limits": {"memory": "64Gi", "nvidia.com/gpu": deployment.gpus},
        },
        "startupProbe": _probe(every_s=10, failures=360),
        "readinessProbe": _probe(every_s=5, failures=3),
        "livenessProbe": _probe(every_s=20, failures=6),
        "securityContext": _container_security(),
        "volumeMounts": [
            {"name": "adapters", "mountPath": ADAPTERS, "readOnly": True},
            {"name": "cache", "mountPath": _CACHE},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # or the names VLLM_… of services become vLLM's settings
        "terminationGracePeriodSeconds": 120,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [
            {
                "name": "adapters",
                "persistentVolumeClaim": {"claimName": f"{deployment.name}-adapters", "readOnly": True},
            },
            {"name": "cache", "emptyDir": {"sizeLimit": deployment.cache}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "4Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }


def _router_pod(deployment: VllmDeployment, worker: str, router: str) -> dict[str, Any]:
    """The router, which finds the replicas by their label."""
    found = ["--service-discovery", "--selector", f"app={worker}", "--service-discovery-port", str(_PORT)]
    container = {
        "name": "router",
        "image": deployment.images["router"],
        "command": _router(*found, "--service-discovery-namespace", "$(NAMESPACE)"),
        "env": [{"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}],
        "ports": [{"name": "http", "containerPort": _PORT}, {"name": "metrics", "containerPort": _METRICS}],
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "2Gi"}},
        "readinessProbe": {**_probe(every_s=5, failures=3), "httpGet": {"path": "/readiness", "port": "http"}},
        "livenessProbe": {**_probe(every_s=20, failures=6), "httpGet": {"path": "/liveness", "port": "http"}},
        "securityContext": _container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "serviceAccountName": router,
        "enableServiceLinks": False,
        "securityContext": _pod_security(),
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }
