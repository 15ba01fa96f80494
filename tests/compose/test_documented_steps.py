"""The steps of the guides on a Docker engine, in order, each on the state that the steps before it left.

Real: the engine, the images of the Dockerfile, the network, all processes. Stand-ins: the base images. No GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests import tiny_base
from tests.compose.deployment import REHEARSAL, CommandFailed, Deployment, deployed, guide_blocks
from tests.compose.logs import problems
from tests.services.programs import Missing

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]
HARDENED = """
if touch /usr/probe 2>/dev/null; then exit 1; fi
grep -q '^CapBnd:.*0000000000000000$' /proc/1/status
grep -q '^NoNewPrivs:.*1$' /proc/1/status
[ "$(id -u)" = 10001 ]
"""
ASK = 'lorry chat {model} "What color is the lorry?"'


@pytest.fixture(scope="module")
def lorry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    for program in ("docker", "mmdebstrap"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs a running Docker engine")
    folder = tmp_path_factory.mktemp("compose")
    try:
        with deployed(folder) as deployment:
            yield deployment
    except Missing as missing:
        pytest.skip(f"needs the base images: {missing}")


def test_empty_secrets_are_refused(lorry: Deployment) -> None:
    lorry.guide("install -m 600 .env.example .env")

    with pytest.raises(CommandFailed, match=r"set it in \.env"):
        lorry.shell("docker compose config --quiet")

    lorry.guide("openssl rand")
    lorry.guide("s/^COMPOSE_PROFILES")
    lorry.shell("docker compose config --quiet")


def test_images_are_built_and_only_those_with_cuda_have_a_compiler(lorry: Deployment) -> None:
    lorry.guide("docker compose build")

    for image in ("lorry-api", "lorry-worker-cpu"):
        assert lorry.shell(f"docker run --rm {image}:latest sh -c 'id -u; command -v gcc || echo none'").split() == [
            "10001",
            "none",
        ]


def test_service_starts_in_the_documented_order(lorry: Deployment) -> None:
    tiny_base.make(lorry.folder / "models" / "tiny")
    lorry.shell("chmod -R a+rX models")

    bootstrapped = lorry.guide("docker compose run --rm bootstrap")
    (key,) = re.findall(r'"api_key": "([^"]+)"', bootstrapped)
    lorry.guide("docker compose up -d")

    lorry.wait_until_healthy("api", "worker-cpu")
    assert '"status":"ok"' in lorry.guide("/readyz")
    lorry.guide("lorry login", stdin=key)
    (lorry.folder.parent / "key").write_text(key)


@pytest.mark.parametrize("service", ["api", "worker-cpu", "store"])
def test_containers_are_read_only_and_without_privileges(lorry: Deployment, service: str) -> None:
    lorry.shell(f"docker compose exec -T {service} sh -e -s", stdin=HARDENED)


def test_job_trains_and_its_adapter_answers_and_is_pulled(lorry: Deployment) -> None:
    tiny_base.write_chat(lorry.folder / "chats.jsonl", 32)

    lorry.shell("lorry models add base /models/tiny")
    lorry.shell("lorry jobs submit base chats.jsonl --epochs 2 --suffix first --watch")

    assert lorry.shell(ASK.format(model="first")).strip()
    lorry.shell("lorry adapters pull first pulled && test -s pulled/adapter_model.safetensors")


def test_cordon_survives_a_new_container(lorry: Deployment) -> None:
    (before,) = running_workers(lorry)
    lorry.shell(f"lorry workers cordon {before['id']}")
    lorry.collect_logs()

    lorry.shell("docker compose up -d --force-recreate --no-deps worker-cpu")
    lorry.wait_until_healthy("worker-cpu")

    (after,) = running_workers(lorry)
    assert after["id"] != before["id"]
    assert after["cordon"] is not None
    lorry.shell(f"lorry workers uncordon {after['id']}")


def running_workers(lorry: Deployment) -> list[dict[str, Any]]:
    listed = json.loads(lorry.shell("lorry workers list --json"))
    return [worker for worker in listed if worker["state"] in ("idle", "busy")]


def test_job_survives_a_killed_worker(lorry: Deployment) -> None:
    job_id = lorry.shell("lorry jobs submit base chats.jsonl --epochs 100 --suffix killed --quiet").strip()
    lorry.until(lambda: ((lorry.job(job_id)["progress"] or {}).get("step") or 0) >= 2, "the job trains")

    lorry.shell(f"kill -9 $(docker inspect -f '{{{{.State.Pid}}}}' {lorry.container('worker-cpu')})")
    assert lorry.job(job_id)["status"] == "running", "the job is too short for this test"

    lorry.until(lambda: lorry.job(job_id)["status"] == "succeeded", "the job succeeds")


def test_backup_is_restored_into_another_project(lorry: Deployment) -> None:
    with pytest.raises(CommandFailed, match=r"/backups"):
        lorry.shell("docker compose run --rm backup")
    lorry.shell("install -d -m 700 -o 0 -g 0 backups")
    with pytest.raises(CommandFailed, match=r"user with ID 10001 can't use the folder /backups"):
        lorry.shell("docker compose run --rm backup")
    lorry.guide("sudo install -d")
    lorry.guide("docker compose run --rm backup")

    lorry.guide("docker compose exec api python -m api verify")

    other = lorry.beside(f"{lorry.env['COMPOSE_PROJECT_NAME']}-{REHEARSAL}", "172.31.251.0/24")
    try:
        printed = other.guide("export COMPOSE_PROJECT_NAME")
        assert "no problems" in printed
        assert other.volumes() != ""
        other.guide("docker compose -p rehearsal down --volumes")
        assert other.volumes() == ""
        lorry.guide("docker compose exec api python -m api verify")

        other.guide("docker compose down --volumes")
        other.guide("docker compose run --rm restore\ndocker compose run --rm bootstrap\ndocker compose up -d")
        other.wait_until_healthy("api", "worker-cpu")
        other.guide("lorry login", stdin=(other.folder.parent / "key").read_text())
        assert other.shell(ASK.format(model="killed")).strip()
        other.collect_logs()
    finally:
        other.remove()


def test_upgrade_installs_no_packages_if_only_code_has_changed(lorry: Deployment) -> None:
    with (lorry.folder / "api" / "app.py").open("a") as module:
        module.write("# changed\n")
    lorry.collect_logs()

    printed = lorry.guide("docker compose build\ndocker compose run --rm bootstrap")

    steps = dict(re.findall(r"^#(\d+) \[[^]]*\] RUN (.*)$", printed, re.MULTILINE))
    cached = set(re.findall(r"^#(\d+) CACHED$", printed, re.MULTILINE))
    installing = {number for number, command in steps.items() if "--require-hashes" in command or "apt-get" in command}
    assert installing
    assert installing <= cached, printed
    lorry.wait_until_healthy("api", "worker-cpu")


def test_down_leaves_no_process_and_up_keeps_everything(lorry: Deployment) -> None:
    lorry.collect_logs()

    lorry.guide("docker compose down")

    project = lorry.env["COMPOSE_PROJECT_NAME"]
    assert lorry.shell(f"docker ps --all --quiet --filter label=com.docker.compose.project={project}") == ""
    lorry.guide("docker compose up -d")
    lorry.wait_until_healthy("api", "worker-cpu")
    assert lorry.shell(ASK.format(model="killed")).strip()


def test_every_log_line_is_json_and_none_has_a_traceback(lorry: Deployment) -> None:
    lorry.collect_logs()

    assert len(lorry.logged) > 100
    assert problems(lorry.logged) == []


def test_every_block_of_the_guides_that_needs_docker_has_run(lorry: Deployment) -> None:
    assert {block.text for block in guide_blocks()} == lorry.has_run
