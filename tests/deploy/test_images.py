"""The Dockerfile, the compose file and the manifests keep what the service needs of them.

No image is built and no cluster is asked here: what they say is held against
the configuration, the health protocol and each other.
"""

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import app, settings
from service.__main__ import command_line, main
from service.config import BadConfig, Config
from tests.certificates import Authority
from tests.deploy.queries import DEPLOY, ROOT
from tests.e2e.conftest import GUARD_S, ServiceProcess

KUBERNETES = DEPLOY / "kubernetes"
OURS_IN_COMPOSE = ("graft", "graft-gpu")

needs_kustomize = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl, which has kustomize, is not on the PATH"
)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, lines joined, comments dropped."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        (name, rest)
        for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Each stage: what it is made from, and its instructions."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = (base, [])
        elif found:
            found[list(found)[-1]][1].append((name, rest))
    return found


def of_runtime(name: str) -> list[str]:
    return [rest for instruction, rest in stages()["runtime"][1] if instruction == name]


def environment_of_image() -> dict[str, str]:
    pairs = (re.findall(r"(\w+)=(\S+)", rest) for rest in of_runtime("ENV"))
    return {key: value for found in pairs for key, value in found}


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


@functools.cache
def built(overlay: str) -> dict[str, dict[str, Any]]:
    """The overlay's objects by their kind."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / overlay)],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {found["kind"]: found for found in yaml.safe_load_all(done.stdout)}


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "m": 60}[unit]


# The image


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target_is_the_one_runtime_with_an_environment_of_its_own(target: str) -> None:
    base, steps = stages()[target]
    assert base == "runtime"
    (copied,) = (rest for name, rest in steps if name == "COPY")
    assert copied == f"--from={target}-environment /opt/graft /opt/graft"
    assert not [rest for name, rest in steps if name in ("USER", "RUN")]


def test_the_image_runs_as_nobody_in_particular() -> None:
    assert of_runtime("USER") == ["10001:10001"]
    names = [name for name, _ in stages()["runtime"][1]]
    assert "RUN" not in names[names.index("USER") :]


def test_the_image_opens_the_ports_and_the_folder_that_the_service_takes() -> None:
    given = {k: v for k, v in environment_of_image().items() if k.startswith("GRAFT_")}
    config = settings.load({}, given | {"GRAFT_ACCESS_FILE": "/etc/graft/access.toml"})
    assert of_runtime("EXPOSE") == [f"{config.port} {config.metrics_port}"]
    assert of_runtime("VOLUME") == [str(config.data_dir)]
    assert (config.host, config.metrics_host) == ("0.0.0.0", "0.0.0.0")
    assert of_runtime("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_serves_and_does_what_else_the_command_can() -> None:
    assert json.loads(of_runtime("ENTRYPOINT")[0]) == ["tini", "--", "graft-server"]
    given = command_line().parse_args(json.loads(of_runtime("CMD")[0]))
    assert given.command == "run"


def test_all_that_is_copied_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    kept = [line[1:] for line in ignored if line.startswith("!")]
    for _, steps in stages().values():
        for name, rest in steps:
            if name == "COPY" and not rest.startswith("--from"):
                for source in rest.split()[:-1]:
                    assert (ROOT / source).exists()
                    assert any(k == source or k.startswith(f"{source}/") for k in kept), source


@pytest.mark.e2e
def test_the_image_health_check_asks_a_service_that_wants_certificates_and_tokens(
    tmp_path: Path,
) -> None:
    (check,) = of_runtime("HEALTHCHECK")
    command = json.loads(check.partition(" CMD ")[2])
    authority = Authority()
    cert, key = authority.sign().write(tmp_path, "server")
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    access = tmp_path / "access.toml"
    made = ["--tenant=acme", "--role=predict", f"--access-file={access}"]
    assert main(["tokens", "create", *made]) == 0
    service = ServiceProcess(
        tmp_path / "data",
        f"--tls-cert-file={cert}",
        f"--tls-key-file={key}",
        f"--tls-client-ca-file={tmp_path / 'ca.pem'}",
        f"--access-file={access}",
    )
    try:
        port = service.metrics_url.rpartition(":")[2].removesuffix("/metrics")
        deadline = time.monotonic() + GUARD_S
        # Docker asks again, too, where an answer takes longer than the command waits.
        while health(command, port) != 0:
            assert time.monotonic() < deadline, "".join(service.seen)
    finally:
        service.end()
    assert health(command, port) != 0


def health(command: list[str], port: str) -> int:
    assert command[0] == "python"
    return subprocess.run(
        [sys.executable, *command[1:]],
        env={"GRAFT_METRICS_PORT": port, "http_proxy": "http://127.0.0.1:9"},
        stderr=subprocess.DEVNULL,
        timeout=GUARD_S,
        check=False,
    ).returncode


def test_the_image_lets_nobody_in_who_was_not_named() -> None:
    given = {k: v for k, v in environment_of_image().items() if k.startswith("GRAFT_")}
    with pytest.raises(BadConfig, match="access-file"):
        settings.load({}, given)


def test_the_build_takes_only_wheels_that_the_lock_names() -> None:
    """The two of PyTorch without CUDA by their versions, everything else by its hashes."""
    installs = [
        command
        for _, steps in stages().values()
        for name, rest in steps
        if name == "RUN"
        for command in re.split(r" && ", rest)
        if command.lstrip().startswith("pip ") and "/wheels/*.whl" not in command
    ]
    files = set()
    for command in (c for c in installs if "pip install" in c):
        words = command.split()
        assert {"--no-deps", "--only-binary"} <= set(words), command
        listed = words[words.index("-r") + 1]
        files.add(listed)
        assert ("--require-hashes" in words) == (listed != "cpu-torch.txt")
    assert files == {path.name for path in (DEPLOY / "locks").iterdir()}
    (built,) = (c for c in installs if "pip wheel" in c)
    assert "--no-build-isolation" in built
    assert sum("pip check" in c for c in installs) == 2


# Compose


@pytest.mark.parametrize("name", OURS_IN_COMPOSE)
def test_compose_gives_the_service_settings_that_it_knows(name: str) -> None:
    service = compose()["services"][name]
    # Inside, it listens on every address, as the image says.
    config = settings.load({}, service["environment"] | {"GRAFT_HOST": "0.0.0.0"})
    assert config.allow_unauthenticated == "no"
    assert seconds(service["stop_grace_period"]) >= config.drain_s + 10
    assert f"127.0.0.1:{config.port}:{config.port}" in service["ports"]


@pytest.mark.parametrize("name", OURS_IN_COMPOSE)
def test_compose_gives_the_service_a_root_that_it_cannot_write(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert any(mount.startswith("/tmp") for mount in service["tmpfs"])
    assert service["volumes"] == [
        f"graft-data:{environment_of_image()['GRAFT_DATA_DIR']}",
        "./secrets:/etc/graft:ro",
    ]
    assert Path(service["environment"]["GRAFT_ACCESS_FILE"]).parent == Path("/etc/graft")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    # What tokens and keys lie in goes neither into the image nor into git.
    assert "*" in (ROOT / ".dockerignore").read_text().split()
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().split()
    assert service["build"]["target"] in stages()
    assert (DEPLOY / service["build"]["context"] / "Dockerfile").is_file()


def test_no_profile_starts_two_services_on_one_data_folder() -> None:
    services = compose()["services"]
    profiles = [set(services[name]["profiles"]) for name in OURS_IN_COMPOSE]
    assert all(profiles)
    assert not profiles[0] & profiles[1]


def test_prometheus_finds_either_service_by_one_name() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (target,) = next(s for s in scraped["scrape_configs"] if s["job_name"] == "graft")[
        "static_configs"
    ][0]["targets"]
    assert target == f"graft:{Config().metrics_port}"
    for name in OURS_IN_COMPOSE:
        assert compose()["services"][name]["networks"]["default"]["aliases"] == ["graft"]


def test_every_file_that_compose_mounts_is_there() -> None:
    mounts = [
        mount for s in compose()["services"].values() for mount in s["volumes"] if mount[0] == "."
    ]
    assert len(mounts) >= 4
    for mount in mounts:
        source, _, mode = mount.split(":")
        # The one folder that whoever runs it fills: compose.yaml says how.
        assert (DEPLOY / source).exists() or source == "./secrets", source
        assert mode == "ro"


# Kubernetes


@needs_kustomize
@pytest.mark.parametrize("overlay", ["base", "gpu"])
class TestKubernetes:
    """The built manifests, with and without a GPU."""

    def test_the_service_gets_settings_that_it_knows_and_time_to_drain(self, overlay: str) -> None:
        pod, config = pod_of(overlay), settings_of(overlay)
        assert pod["terminationGracePeriodSeconds"] >= config.drain_s + 10
        # Counted by the container's limit.
        assert config.threads == config.trainer_threads == 0
        # Injected variables of a Service of that name would be refused as settings.
        assert pod["enableServiceLinks"] is False

    def test_one_process_alone_holds_the_data(self, overlay: str) -> None:
        objects = built(overlay)
        deployment = objects["Deployment"]["spec"]
        assert deployment["replicas"] == 1
        assert deployment["strategy"] == {"type": "Recreate"}
        (data,) = (v for v in pod_of(overlay)["volumes"] if v["name"] == "data")
        claim = objects["PersistentVolumeClaim"]
        assert data["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]

    def test_probes_ask_what_needs_neither_certificate_nor_token(self, overlay: str) -> None:
        container = container_of(overlay)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/healthz", "port": "metrics"}
            # The service itself gives up before the probe does.
            assert container[probe]["timeoutSeconds"] > app._HEALTH_TIMEOUT_S
        assert {p["name"]: p["containerPort"] for p in container["ports"]} == {
            "grpc": Config().port,
            "metrics": Config().metrics_port,
        }

    def test_the_container_can_write_its_data_and_temporary_files_alone(self, overlay: str) -> None:
        pod, container = pod_of(overlay), container_of(overlay)
        uid, gid = (int(part) for part in of_runtime("USER")[0].split(":"))
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == uid
        assert pod["securityContext"]["fsGroup"] == gid
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = container["volumeMounts"]
        writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
        assert writable == {environment_of_image()["GRAFT_DATA_DIR"], "/tmp", "/dev/shm"}
        assert {mount["name"] for mount in mounts} == {v["name"] for v in pod["volumes"]}

    def test_who_may_call_is_a_secret_that_only_the_service_reads(self, overlay: str) -> None:
        (secret,) = (v["secret"] for v in pod_of(overlay)["volumes"] if "secret" in v)
        # Others than root could not read 0400; the service refuses what others may write.
        assert secret == {"secretName": "graft-access", "defaultMode": 0o440}
        config = settings_of(overlay)
        assert config.access_file == Path("/etc/graft/access/access.toml")
        assert (config.tls_cert_file, config.allow_unauthenticated) == (None, "no")

    def test_certificates_come_in_where_the_component_is_added(
        self, overlay: str, tmp_path: Path
    ) -> None:
        shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
        (tmp_path / "kubernetes" / "own").mkdir()
        (tmp_path / "kubernetes" / "own" / "kustomization.yaml").write_text(
            f"resources: [../{overlay}]\ncomponents: [../tls]\n"
        )
        own = str(tmp_path / "kubernetes" / "own")
        config = settings_of(own)
        assert config.tls_cert_file == Path("/etc/graft/tls/tls.crt")
        assert config.tls_key_file == Path("/etc/graft/tls/tls.key")
        assert config.access_file is not None
        objects = built(own)
        (mount,) = (m for m in container_of(own)["volumeMounts"] if m["name"] == "tls")
        assert mount["readOnly"] is True
        secrets = {v["secret"]["secretName"] for v in pod_of(own)["volumes"] if "secret" in v}
        assert secrets == {"graft-access", objects["Certificate"]["spec"]["secretName"]}
        ports = {port["name"]: port for port in objects["Service"]["spec"]["ports"]}
        assert ports["grpc"]["appProtocol"] == "https"
        assert ports["grpc"]["targetPort"] == "grpc"
        assert "metrics" in ports

    def test_the_operator_watches_it_where_the_component_is_added(
        self, overlay: str, tmp_path: Path
    ) -> None:
        shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
        (tmp_path / "kubernetes" / "own").mkdir()
        (tmp_path / "kubernetes" / "own" / "kustomization.yaml").write_text(
            f"resources: [../{overlay}]\ncomponents: [../monitoring, ../tls]\n"
        )
        objects = built(str(tmp_path / "kubernetes" / "own"))
        watched = objects["ServiceMonitor"]["spec"]
        service = objects["Service"]
        wanted = watched["selector"]["matchLabels"]
        assert wanted.items() <= service["metadata"]["labels"].items()
        (endpoint,) = watched["endpoints"]
        assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
        # As the alerts call it.
        assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "graft"}]
        assert objects["PrometheusRule"]["spec"]["groups"]

    def test_only_clients_and_what_watches_reach_it_and_it_reaches_nobody(
        self, overlay: str
    ) -> None:
        objects = built(overlay)
        policy = objects["NetworkPolicy"]["spec"]
        template = objects["Deployment"]["spec"]["template"]["metadata"]
        assert policy["podSelector"]["matchLabels"].items() <= template["labels"].items()
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        assert policy["egress"] == []
        assert all(rule["from"] for rule in policy["ingress"])
        assert [rule["ports"] for rule in policy["ingress"]] == [
            [{"port": "grpc"}],
            [{"port": "metrics"}],
        ]

    def test_the_service_and_prometheus_find_the_pod(self, overlay: str) -> None:
        objects = built(overlay)
        template = objects["Deployment"]["spec"]["template"]["metadata"]
        selector = objects["Service"]["spec"]["selector"]
        assert selector.items() <= template["labels"].items()
        assert selector == objects["Deployment"]["spec"]["selector"]["matchLabels"]
        assert template["annotations"]["prometheus.io/scrape"] == "true"
        assert template["annotations"]["prometheus.io/port"] == str(Config().metrics_port)
        names = {port["name"] for port in container_of(overlay)["ports"]}
        assert {port["targetPort"] for port in objects["Service"]["spec"]["ports"]} == names

    def test_the_image_and_its_resources_fit(self, overlay: str) -> None:
        container = container_of(overlay)
        target = {"base": "cpu", "gpu": "gpu"}[overlay]
        assert container["image"] == f"graft:{target}"
        assert target in stages()
        (provider,) = (e["value"] for e in container["env"] if e["name"] == "GRAFT_PROVIDER")
        assert provider == {"cpu": "cpu", "gpu": "cuda"}[target]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (target == "gpu")
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][kind])

    def test_the_memory_limit_holds_what_the_runbook_counts(self, overlay: str) -> None:
        config = Config()
        jobs = config.cpu_jobs + (config.gpu_jobs if overlay == "gpu" else 0)
        (shm,) = (v["emptyDir"] for v in pod_of(overlay)["volumes"] if v["name"] == "shm")
        # The process, each job's trainer, the one that ranks, and those that wait.
        counted_mb = config.model_memory_mb + 1024 + 2048 * (jobs + 1) + 130 * config.warm_trainers
        limit = container_of(overlay)["resources"]["limits"]["memory"]
        assert mib_of(limit) >= counted_mb + mib_of(shm["sizeLimit"])


def settings_of(overlay: str) -> Config:
    """What the container's environment says, read as the service reads it."""
    own = {entry["name"]: entry["value"] for entry in container_of(overlay)["env"]}
    return settings.load({}, {**environment_of_image(), **own})


def mib_of(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi")) * 1024


def pod_of(overlay: str) -> dict[str, Any]:
    pod: dict[str, Any] = built(overlay)["Deployment"]["spec"]["template"]["spec"]
    return pod


def container_of(overlay: str) -> dict[str, Any]:
    (container,) = pod_of(overlay)["containers"]
    found: dict[str, Any] = container
    return found
